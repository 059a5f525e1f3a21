"""Names of kernels and operators, as regular expressions, and what they do.

Each row is library, role, group and expression. An expression is searched in the bare name:
without return type, template arguments and parameters, because those repeat other kernels' names.
The first row that fits counts, so communication stands before what any library may compute. A name
that has words of an exchange and that no row of communication knows is left unknown rather than
taken for computation, because a report lists what is unknown, and an exchange that counts as
computation would seem to hide others.

Of an exchange, what only waits for other ranks has the role "wait": notifications, which wait for
every peer's counts, barriers, and kernels that wait for a signal. What works out a layout from the
rank's own routing is computation, though the library that exchanges does it.
"""

from __future__ import annotations

COMMUNICATION = "communication"
COMPUTE = "compute"
COPY = "copy"
UNKNOWN = "unknown"
GROUPS = (COMMUNICATION, COMPUTE, COPY, UNKNOWN)

WAIT = "wait"
GEMM = "gemm"

# In what a report says of names that are in no row.
IN_NO_RULE = "has names that are in no rule"

# DeepSeek's own builds and forks name the namespace otherwise, but it ends in "ep".
_DEEP_EP = r"ep::(legacy::)?(internode|intranode|internode_ll)::"
_ELASTIC = r"(^|ep::elastic::)"
_NCCL = r"^nccl(Symk?)?(Dev)?Kernel_"

_SYMMETRIC = r"^(c10d::)?(symmetric_memory::)?"

_NCCL_ROLES = (
    ("AllReduce", "allreduce"),
    ("AllGather", "allgather"),
    ("ReduceScatter", "reduce_scatter"),
    ("AllToAll|AlltoAll", "all_to_all"),
    ("SendRecv", "send_recv"),
    ("Broadcast", "broadcast"),
    ("Reduce", "reduce"),
    ("Gather", "gather"),
    ("Scatter", "scatter"),
)

_CPU_ROLES = (
    (r"all_?to_?all", "all_to_all"),
    (r"_?all_?reduce", "allreduce"),
    (r"_?reduce_?scatter", "reduce_scatter"),
    (r"_?all_?gather", "allgather"),
    (r"send", "send"),
    (r"recv", "receive"),
    (r"broadcast", "broadcast"),
    (r"barrier|monitored_barrier", WAIT),
    (r"reduce", "reduce"),
    (r"gather", "gather"),
    (r"scatter", "scatter"),
)

_EXCHANGES = (
    ("DeepEP", WAIT, _DEEP_EP + r"(notify_dispatch|cached_notify\w*|barrier)$"),
    ("DeepEP", WAIT, _DEEP_EP + r"clean_low_latency_buffer$"),
    ("DeepEP", "dispatch", _DEEP_EP + r"dispatch$"),
    ("DeepEP", "combine", _DEEP_EP + r"combine$"),
    ("DeepEP", "dispatch", _ELASTIC + r"(hybrid_)?dispatch(_copy_epilogue)?_impl$"),
    ("DeepEP", "combine", _ELASTIC + r"(hybrid_)?combine(_reduce_epilogue)?_impl$"),
    ("DeepEP", WAIT, r"ep::elastic::barrier_impl$"),
    ("DeepEP", WAIT, _ELASTIC + r"engram_fetch_wait_impl$"),
    ("DeepEP", "fetch", _ELASTIC + r"engram_fetch_impl$"),
    ("DeepEP", "send", _ELASTIC + r"pp_send_impl$"),
    ("DeepEP", "receive", _ELASTIC + r"pp_recv_impl$"),
    ("HybridEP", "dispatch", r"hybrid_ep::dispatch_kernel"),
    ("HybridEP", "combine", r"hybrid_ep::combine_kernel"),
    ("HybridEP", "allgather", r"(^|::)ag_nvl_kernel$"),
    ("HybridEP", WAIT, r"(^|hybrid_ep::)device_sync_kernel$"),
    ("MORI", "dispatch", r"^(mori::\w+::)?EpDispatch\w*Kernel"),
    ("MORI", "combine", r"^(mori::\w+::)?EpCombine\w*Kernel"),
    ("TensorRT-LLM", "dispatch", r"(^|::)moeA2ADispatchKernel$"),
    ("TensorRT-LLM", "combine", r"(^|::)moeA2ACombineKernel$"),
)

_COLLECTIVES = (
    ("RCCL", "collective", r"^(rccl|msccl)\w*Kernel|^ncclDevKernel_Generic_\d"),
    *(("NCCL", role, f"{_NCCL}({name})(_|$)") for name, role in _NCCL_ROLES),
    ("NCCL", "collective", r"^nccl\w*Kernel"),
    ("NVSHMEM", WAIT, r"^(nvshmem\w*_)?(barrier|sync|\w+_wait\w*)_on_stream_kernel"),
    ("NVSHMEM", WAIT, r"^nvshmem\w*(barrier|sync|wait|quiet)"),
    ("NVSHMEM", "all_to_all", r"^(nvshmem\w*_)?alltoall\w*_on_stream_kernel"),
    ("NVSHMEM", "collective", r"^nvshmem|_on_stream_kernel(_threadgroup)?$"),
    ("MSCCL++", "collective", r"\bmscclpp\w*::"),
    ("symmetric memory", WAIT, f"{_SYMMETRIC}(barrier|wait_signal)_kernel$"),
    ("symmetric memory", "send", f"{_SYMMETRIC}put_signal_kernel$"),
    (
        "symmetric memory",
        "allreduce",
        r"(^|::)(one_shot|two_shot|multimem)(_one_shot)?_(all_reduce|reduce)_kernel\w*$",
    ),
    ("symmetric memory", "allgather", r"(^|::)multimem_all_gather_kernel$"),
    ("symmetric memory", WAIT, r"(^|::)exchangeSplitAndOffset\w*$"),
    ("symmetric memory", "all_to_all", r"(^|::)allToAllV\w*$"),
    ("userbuffers", "reduce_scatter", r"^userbuffers_fp16_sum_inplace_gpu_\w+_rs(_|$)"),
    ("userbuffers", "allgather", r"^userbuffers_fp16_sum_inplace_gpu_\w+_ag(_|$)"),
    ("userbuffers", "allreduce", r"^userbuffers_fp16_sum_inplace"),
    ("userbuffers", "receive", r"^k?userbuffers_(push|pull)recv"),
    ("userbuffers", "send_recv", r"^k?userbuffers_(push|pull)send"),
    ("vLLM", "allreduce", r"(^|::)cross_device_reduce_[12]stage$"),
    ("quickreduce", "allreduce", r"^quickreduce::allreduce_prototype_\w+$"),
    # Each is fused with what follows the sum, and waits for its peers all the same.
    (
        "TensorRT-LLM",
        "allreduce",
        r"(^|::)(allreduce_fusion_kernel_(one|two)shot\w*|(one|two)shot_?all_?reduce\w*kernel)$",
    ),
    (
        "TensorRT-LLM",
        "allreduce",
        r"(^|::)((one|two)shotAllreduce\w*Kernel|lamport_style_one_shot_all_reduce_\w+)$",
    ),
)

_OPERATORS = (
    *(("gloo", role, f"^gloo:(:|)({name})") for name, role in _CPU_ROLES),
    ("gloo", "collective", r"^gloo:"),
    *(("NCCL", role, f"^nccl:({name})") for name, role in _CPU_ROLES),
    ("NCCL", "collective", r"^nccl:"),
    *(("c10d", role, f"^(c10d|_c10d_functional)::_?({name})") for name, role in _CPU_ROLES),
    ("c10d", WAIT, r"^_c10d_functional::wait_tensor$"),
    ("c10d", "collective", r"^(c10d|_c10d_functional)::|^record_param_comms$"),
)

_COPIES = (
    r"^Memcpy (HtoD|DtoH|DtoD|HtoH|HtoA|AtoH|AtoD|DtoA|AtoA)\b",
    r"^Memcpy Unknown",
    r"^Memset\b",
    r"^Copy(Host|Device)To(Host|Device)",
    r"^FillBuffer",
)

_GEMM = (
    r"gemm|gemv|cublas|nvjet|xmma|cutlass|_matmul|^Cijk_|splitKreduce|dot_kernel|GemmUniversal",
    r"^(ampere|volta|turing|sm\d\d)_\w*(s\d+|tensorop|h\d+)",
)
_ATTENTION = r"flash|fmha|attention|attn|softmax|rotary|rope"
_WHOLE_ATTENTION = r"^(void )?cutlass::.*([Ff]lash|[Ff]mha|[Aa]ttention)"

_COMPUTING = (
    ("DeepEP", "layout", r"ep::(\w+::)*get_dispatch_layout$"),
    ("DeepEP", "layout", _DEEP_EP + r"(query|update|clean)_mask_buffer$"),
    ("PyTorch", "", r"^at::|^at_cuda_detail::|^c10::|^at_\w+::"),
    # What a compiler fused is named after the operators in it, collectives it only prepares too.
    ("Triton", "", r"^triton_(poi|per|red|tem|for|mm|unk)_fused"),
    ("cuDNN", "", r"^cudnn"),
    ("CUB", "", r"^(at_cuda_detail::)?(cub|thrust)::"),
)

# Words of an exchange, in a name that no row of communication knows.
_SUSPICIOUS = (
    r"(?i)all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|nvls|multimem",
    r"(^|[_:])a2a|A2A",
    r"(?i)(ep|moe).*(dispatch|combine)",
    r"(^|[_:])(ag|rs|gather_rs)_(gemm|kernel)|(^|[_:])gemm_(rs|ar)(_|$)",
    r"(^|[_:])barrier_kernel$",
)

_OTHER_LIBRARIES = (
    ("HybridEP", "layout", r"hybrid_ep::|^(update_expected_value|permute_preprocessing)_kernel$"),
    ("Triton", "", r"^triton_"),
)

_KINDS_OF_COMPUTING = (
    r"layer_?norm|rms_?norm|ln_(fwd|bwd)|batch_?norm|group_?norm",
    r"element_?wise|vectorized|unrolled|reduce_kernel|reduce_\w+|scatter|gather|index|arange|sort",
    r"cast|quant|transpose|permute|pad\b|concat|cat_|copy|fill|expand|mapping",
    r"swiglu|silu|gelu|relu|sigmoid|dropout|embedding|cross_entropy|loss",
    r"topk|top_k|count_expert|histogram|bincount|cumsum|scan|aux_fi|moe_",
    r"multi_tensor|adam|sgd|lamb|optimizer|grad_norm|l2norm|clip",
    r"conv|winograd|im2col|pool|fft",
)

# Operators of a CPU run that may be named after an exchange and never are one themselves.
_TENSOR_OPERATORS = (
    r"^(aten|prims?|mkldnn|onednn|quantized|torchvision|_quantized|prim)::",
    r"^(torch::)?autograd::|Backward\d*$|^detach_?$",
)

# The functions that this project adds to autograd. Those of dispatch and combine prepare a move and
# then wait for it; the move itself runs, and is marked, on the thread that communicates.
_OWN = r"^_(Linear|GroupedLinear|RMSNorm|SwigluMLP|Dispatch|Combine|Enter)$"

_COMPUTING_OPERATORS = (
    r"^Optimizer\.|^torch::|^torchao::|^inductor::|^Torch-Compiled Region|^TorchDynamo",
    r"^transformer_engine|^enumerate\(DataLoader\)",
)

# library, role, group, expression, whether it is searched in the bare name
ROWS: tuple[tuple[str, str, str, str, bool], ...] = (
    *((library, role, COMMUNICATION, match, True) for library, role, match in _EXCHANGES),
    *((library, role, COMMUNICATION, match, True) for library, role, match in _COLLECTIVES),
    *((library, role, COMMUNICATION, match, True) for library, role, match in _OPERATORS),
    ("", "peer_copy", COMMUNICATION, r"^Memcpy PtoP\b|^CopyPeerToPeer", True),
    *(("", "", COPY, match, True) for match in _COPIES),
    *((library, role, COMPUTE, match, True) for library, role, match in _COMPUTING),
    *(("", "", COMPUTE, match, True) for match in _TENSOR_OPERATORS),
    ("counterflow", "", COMPUTE, _OWN, True),
    *(("", "", UNKNOWN, match, True) for match in _SUSPICIOUS),
    *((library, role, COMPUTE, match, True) for library, role, match in _OTHER_LIBRARIES),
    ("", "attention", COMPUTE, _WHOLE_ATTENTION, False),
    *(("", GEMM, COMPUTE, match, True) for match in _GEMM),
    ("", "attention", COMPUTE, _ATTENTION, True),
    *(("", "", COMPUTE, match, True) for match in _KINDS_OF_COMPUTING),
    *(("", "", COMPUTE, match, True) for match in _COMPUTING_OPERATORS),
)
