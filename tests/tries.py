"""A test that is tried once more (`--reruns`, as in CI) has its time limit anew.

pytest-timeout sets one timer around all tries, so that a second one would have no limit: it could
hang for ever.
"""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before pytest-rerunfailures' second try, set the timer again."""
    if getattr(item, "execution_count", 1) > 1:
        from pytest_timeout import (
            _get_item_settings,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
        )

        hook = item.config.hook
        hook.pytest_timeout_cancel_timer(item=item)
        hook.pytest_timeout_set_timer(item=item, settings=_get_item_settings(item))
