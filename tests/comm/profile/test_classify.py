"""What kernels do, by name."""

from pathlib import Path

import pytest

from counterflow.comm.profile.classify import (
    RULES,
    Class,
    Rule,
    bare_name,
    classify,
    classify_all,
    load_rules,
)

COMMUNICATION = {
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": (
        "allreduce",
        "NCCL",
    ),
    "ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)": ("allreduce", "NCCL"),
    "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)": ("send_recv", "NCCL"),
    "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": (
        "reduce_scatter",
        "NCCL",
    ),
    "ncclDevKernel_Reduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": ("reduce", "NCCL"),
    "ncclSymkDevKernel_AllGather_LLMC(ncclSymkDevWorkArgs4K)": ("allgather", "NCCL"),
    "ncclSymDevKernel_AllReduce_RSxLDMC_AGxSTMC_sum_f32(ncclSymDevArgs)": ("allreduce", "NCCL"),
    "ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)": ("collective", "RCCL"),
    "void deep_ep::internode::dispatch<false, 8, false, 8>(int4*, float*)": ("dispatch", "DeepEP"),
    "void dpsk::ep::internode::combine<false, 8, __nv_bfloat16, 8>(int4*)": ("combine", "DeepEP"),
    "void deep_ep::intranode::combine<__nv_bfloat16, 8, 768>(__nv_bfloat16*)": (
        "combine",
        "DeepEP",
    ),
    "void deep_ep::internode_ll::dispatch<true, false, 7168>(void*)": ("dispatch", "DeepEP"),
    "void deep_ep::legacy::intranode::dispatch<8, 768, 8192>(int4*)": ("dispatch", "DeepEP"),
    "void deep_ep::internode::notify_dispatch<false, 8>(int const*)": ("wait", "DeepEP"),
    "void deep_ep::internode::cached_notify<false>(int, int)": ("wait", "DeepEP"),
    "void deep_ep::intranode::cached_notify_combine<8>(void**, int*)": ("wait", "DeepEP"),
    "void deep_ep::intranode::barrier<8>(int**, int)": ("wait", "DeepEP"),
    "void deep_ep::elastic::hybrid_dispatch_impl<true, 4>(int)": ("dispatch", "DeepEP"),
    "void deep_ep::elastic::dispatch_copy_epilogue_impl<1, 2>(int)": ("dispatch", "DeepEP"),
    "void deep_ep::elastic::combine_reduce_epilogue_impl<1, 2>(int)": ("combine", "DeepEP"),
    "void deep_ep::elastic::barrier_impl<true, 4>(int)": ("wait", "DeepEP"),
    "void deep_ep::elastic::pp_send_impl<1, 2, 3, 4>(int)": ("send", "DeepEP"),
    "void hybrid_ep::dispatch_kernel<unsigned char, hybrid_ep::warp_group<4>>(int)": (
        "dispatch",
        "HybridEP",
    ),
    "hybrid_ep::device_sync_kernel(unsigned int*, unsigned int*)": ("wait", "HybridEP"),
    "void (anonymous namespace)::multimem_all_reduce_kernel<c10::BFloat16, 16>(c10::BFloat16*)": (
        "allreduce",
        "symmetric memory",
    ),
    "void c10d::symmetric_memory::(anonymous namespace)::one_shot_all_reduce_kernel<float, 16>()": (
        "allreduce",
        "symmetric memory",
    ),
    "void two_shot_all_reduce_kernel_inplace<c10::BFloat16, 16, 8>(c10::BFloat16**)": (
        "allreduce",
        "symmetric memory",
    ),
    "c10d::symmetric_memory::barrier_kernel(unsigned int**, int)": ("wait", "symmetric memory"),
    "allToAllV_2d(void*, void*, long*)": ("all_to_all", "symmetric memory"),
    "void userbuffers_fp16_sum_inplace_gpu_rw_ag<2>(int, int)": ("allgather", "userbuffers"),
    "void userbuffers_fp16_sum_inplace_gpu_rr_rs_oop_fp8<4, __nv_fp8_e4m3>(int)": (
        "reduce_scatter",
        "userbuffers",
    ),
    "kuserbuffers_pushsendrecv(int, int*)": ("send_recv", "userbuffers"),
    "kuserbuffers_pushrecv(int, int, int)": ("receive", "userbuffers"),
    "barrier_on_stream_kernel(int)": ("wait", "NVSHMEM"),
    "nvshmemi_proxy_quiet_entrypoint()": ("wait", "NVSHMEM"),
    "void vllm::cross_device_reduce_2stage<__nv_bfloat16, 8>(vllm::RankData*)": (
        "allreduce",
        "vLLM",
    ),
    "void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport<4>(int)": (
        "allreduce",
        "TensorRT-LLM",
    ),
    "void tensorrt_llm::kernels::mnnvl::twoshot_allreduce_kernel<8>(int)": (
        "allreduce",
        "TensorRT-LLM",
    ),
    "void tensorrt_llm::kernels::moe_comm::moeA2ADispatchKernel<8>(int)": (
        "dispatch",
        "TensorRT-LLM",
    ),
    "void tensorrt_llm::kernels::moe_comm::moeA2ACombineKernel<8>(int)": (
        "combine",
        "TensorRT-LLM",
    ),
    "void quickreduce::allreduce_prototype_twoshot<quickreduce::CodecQ4>(int)": (
        "allreduce",
        "quickreduce",
    ),
    "Memcpy PtoP (Device -> Device)": ("peer_copy", ""),
    "gloo:all_to_all": ("all_to_all", "gloo"),
    "gloo:send": ("send", "gloo"),
    "c10d::alltoall_base_": ("all_to_all", "c10d"),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", "c10d"),
    "c10d::allreduce_": ("allreduce", "c10d"),
    "_c10d_functional::wait_tensor": ("wait", "c10d"),
    "c10d::barrier": ("wait", "c10d"),
    "record_param_comms": ("collective", "c10d"),
}

# Each has the words of a collective in its name, and none communicates.
COMPUTING = (
    "void at::native::reduce_kernel<128, 4, ReduceOp<float, ncclDevKernel_AllReduce>>()",
    "void at::native::elementwise_kernel<128, 4, at::native::all_reduce_functor>(int)",
    "void cutlass::device_kernel<dpsk::ep::internode::combine<false>::GemmKernel>(int)",
    "triton_per_fused_all_reduce_mul_2",
    "triton_poi_fused_combine_dispatch_0",
    "void dpsk::ep::cuda::get_dispatch_layout<256, 32, 8>(long const*)",
    "deep_ep::layout::get_dispatch_layout(long const*)",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 1>()",
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_nn_n_tilesize128x128x64_cublas",
    "void flash::compute_attn_ws<Flash_fwd_kernel_traits<192, 128>>(int)",
    "aten::scatter_add",
    "aten::gather",
    "autograd::engine::evaluate_function: DispatchBackward0",
    "Optimizer.step#AdamW.step",
)


# Words of an exchange as kernels spell them, and what may stand around them.
SUSPICIOUS = (
    *("all_reduce", "allreduce", "AllReduce", "all_gather", "AllGather", "reduce_scatter"),
    *("ReduceScatter", "all_to_all", "allToAll", "a2a", "multimem", "nvls", "ep_dispatch"),
    *("moe_combine", "moe_ep_combine", "ag_gemm", "gather_rs_kernel"),
)
AROUND = (
    *("{}_kernel", "flash_{}", "scatter_{}", "my_lib::{}_gather_kernel", "reduce_{}_copy"),
    *("triton_{}_gemm", "attn_{}", "moe_{}", "void flux::{}<cutlass::gemm, 4>(int*)"),
)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("word", SUSPICIOUS)
def test_a_name_with_words_of_an_exchange_never_computes_silently(word: str, around: str) -> None:
    name = around.format(word).replace("_kernel_kernel", "_kernel")
    assert classify(name).group in ("unknown", "communication"), name


@pytest.mark.parametrize(
    "name",
    [
        "tensorrt_llm::kernels::nvls_all_gather_kernel(int)",
        "triton_dist_allgather_gemm",
        "void flux::gather_rs_kernel<4>(int)",
        "hybrid_ep::some_new_dispatch(int)",
        "mine::barrier_kernel(int)",
    ],
)
def test_an_exchange_of_a_library_without_rules_is_listed_as_unknown(name: str) -> None:
    assert classify(name) == Class("unknown")


@pytest.mark.parametrize("name", ["_Linear", "_GroupedLinear", "_RMSNorm", "_Dispatch", "_Combine"])
def test_this_projects_functions_of_autograd_are_known(name: str) -> None:
    assert classify(name) == Class("compute", "", "counterflow")
    assert classify(f"{name}Backward").group == "compute"


@pytest.mark.parametrize("name", COMMUNICATION)
def test_names_of_communication_are_known(name: str) -> None:
    role, library = COMMUNICATION[name]
    assert classify(name) == Class("communication", role, library)


@pytest.mark.parametrize("name", COMPUTING)
def test_names_that_only_mention_communication_compute(name: str) -> None:
    assert classify(name).group == "compute"


@pytest.mark.parametrize(
    "name",
    [
        "Memcpy HtoD (Pinned -> Device)",
        "Memcpy DtoH (Device -> Pageable)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
    ],
)
def test_copies_within_a_device_and_to_the_host_are_copies(name: str) -> None:
    assert classify(name).group == "copy"


@pytest.mark.parametrize("name", ["_combine_kernel", "zorp", "", "void my::dispatch<nccl>(int)"])
def test_a_name_in_no_rule_is_unknown(name: str) -> None:
    assert classify(name) == Class("unknown")


def test_gemms_and_attention_are_told_apart_by_template_arguments() -> None:
    gemm = "void cutlass::device_kernel<dpsk::grouped_gemm::cuda::fp8_ptp128c::GemmKernel>(int)"
    attention = "void cutlass::device_kernel<flash::FlashAttnBwd<flash::Mainloop<2>>>(int)"
    assert classify_all([gemm, attention, gemm]) == {
        gemm: Class("compute", "gemm"),
        attention: Class("compute", "attention"),
    }


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("void a::b<c::d<1, (int)4>, e>(f<g>*, int)", "a::b"),
        ("void (anonymous namespace)::k<int>(int*)", "k"),
        ("void k<(128 >> 3), other::nccl>(int*)", "k"),
        ("void cut::short<with::a, long", "cut::short"),
        ("_ZN7deep_ep9internode8dispatchILb0ELi8EEEvP4int4", "deep_ep::internode::dispatch"),
        (
            "_ZN2at6native54_GLOBAL__N__d8ceb000_21_DistributionNormal_cu_17e44f7d3abcIfEvi",
            "at::native::abc",
        ),
        ("_Z13rotary_kernelPf", "rotary_kernel"),
        ("Memset (Device)", "Memset"),
    ],
)
def test_a_bare_name_is_qualified_and_nothing_more(name: str, bare: str) -> None:
    assert bare_name(name) == bare


def test_a_users_rules_come_before_the_table(tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(
        '[[kernel]]\nmatch = "nvjet.*NNT"\ngroup = "communication"\nrole = "dispatch"\n'
        'library = "mine"\n[[kernel]]\nmatch = "^my::copy$"\ngroup = "copy"\nbare = true\n'
    )
    rules = load_rules(file)
    assert classify(COMPUTING[8], rules) == Class("communication", "dispatch", "mine")
    assert classify("void my::copy<int>(int)", rules) == Class("copy")
    assert classify(COMPUTING[9], rules) == classify(COMPUTING[9])
    assert rules[2:] == RULES


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[kernel]]\nmatch = "a"\ngroup = "comm"', "entry 1: group='comm' does not exist"),
        (
            '[[kernel]]\nmatch = "a"\ngroup = "copy"\n[[kernel]]\nmatch = "a("\ngroup = "copy"',
            "entry 2: match='a(' is no regular expression",
        ),
        ('[[kernel]]\ngroup = "copy"', "entry 1: match is missing"),
        ('[[kernel]]\nmatch = "a"', "entry 1: group is missing"),
        ('[[kernel]]\nmatch = 3\ngroup = "copy"', "entry 1: match=3 must be a str"),
        ('[[kernel]]\nmatch = "a"\ngruop = "copy"', "entry 1: unknown key 'gruop'"),
        ('[[kernels]]\nmatch = "a"\ngroup = "copy"', "begin with [[kernel]]"),
        ('kernel = "a"', "begin with [[kernel]]"),
        ("kernel = [1]", "entry 1: must be a table"),
        ("", "found nothing"),
        ("[[kernel", "not TOML"),
    ],
)
def test_a_wrong_rule_is_refused_with_file_and_entry(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"rules\.toml: ") as error:
        load_rules(file)
    assert says in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no-such-file\.toml: cannot read"):
        load_rules(tmp_path / "no-such-file.toml")
    with pytest.raises(ValueError, match="cannot read"):
        load_rules(tmp_path)


def test_a_rule_of_a_group_that_does_not_exist_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="communication, compute, copy, unknown"):
        Rule("a", "network")
