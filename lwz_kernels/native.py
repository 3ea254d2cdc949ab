"""Loads the native CPU library (csrc/, `lwz_kernels/_native.so`) and calls its C functions.

PyTorch brings its own OpenMP runtime. Our library is linked against none: the runtime that
PyTorch has already loaded is made visible first, so both use one thread pool.
Tensors are passed as raw pointers: the callers here check nothing but what the library reports;
shapes, dtypes and contiguity are the operators' job.
"""

import ctypes
import functools
import math
from pathlib import Path

import torch

from lwz_kernels.shared_library import load_shared_library

__all__ = [
    "adamw_",
    "attention",
    "attention_backward",
    "best_level",
    "decode_layers",
    "has_fastest_bf16",
    "is_available",
    "levels",
    "linear",
    "paged_attention",
    "row_statistics",
    "store_kv",
    "supports_attention",
    "supports_depth",
    "supports_head_size",
    "unavailable_reason",
    "vector_exp",
    "write_dlogits_",
]

ABI_VERSION = 6
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")
HEAD_SIZE_STEP = 8
MAX_HEAD_SIZE = 512
ATTENTION_HEAD_STEP = 64
ATTENTION_MAX_HEAD = 256
DEPTH_STEP = 8
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}

_STATUS_MESSAGES = {
    1: f"head size must be a multiple of {HEAD_SIZE_STEP}, at most {MAX_HEAD_SIZE}",
    2: "this processor or this build lacks the requested instruction set",
    3: "page_table names a page that is out of range: expected 0 <= page < num_pages",
    4: "context_lens is out of range: expected 0 <= length <= max_pages * page_size",
    5: "slot_mapping is out of range: expected slot < num_pages * page_size",
    7: f"the inner size must be a multiple of {DEPTH_STEP}",
    8: "logits have no columns: expected a vocabulary of at least one entry",
}
_OUT_OF_MEMORY = 6


def is_available() -> bool:
    """Whether the library was built and loads on this machine."""
    return _load()[0] is not None


def unavailable_reason() -> str:
    """Why the library is not available; empty where it is."""
    return _load()[1]


def levels() -> tuple[str, ...]:
    """Instruction sets that both the build and this processor have, narrowest first."""
    return LEVELS[: _library().lwz_best_level() + 1]


def best_level() -> str:
    """The instruction set that is used unless another is asked for."""
    return levels()[-1]


@functools.cache
def has_fastest_bf16() -> bool:
    """Whether `linear` multiplies bf16 with the widest instructions that this CPU has for it."""
    if not is_available() or best_level() != "avx512_bf16":
        return False
    return not torch.cpu.get_capabilities().get("amx_bf16", False)


def supports_head_size(head_size: int) -> bool:
    """Whether the kernels can run this head size."""
    return head_size % HEAD_SIZE_STEP == 0 and 0 < head_size <= MAX_HEAD_SIZE


def supports_attention(head_size: int) -> bool:
    """Whether `attention` can run this head size on this CPU."""
    return (
        has_fastest_bf16()
        and head_size % ATTENTION_HEAD_STEP == 0
        and 0 < head_size <= ATTENTION_MAX_HEAD
    )


def supports_depth(depth: int) -> bool:
    """Whether `linear` can run this inner size."""
    return depth > 0 and depth % DEPTH_STEP == 0


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    out_dtype: torch.dtype,
    out: torch.Tensor | None = None,
    level: str | None = None,
) -> torch.Tensor:
    """x·weightᵀ + bias of contiguous CPU tensors; `level=None` takes the best instruction set."""
    library = _library()
    num_rows, depth = x.shape
    if out is None:
        out = torch.empty(num_rows, weight.shape[0], dtype=out_dtype)
    status = library.lwz_linear(
        x.data_ptr(),
        weight.data_ptr(),
        _address(bias),
        out.data_ptr(),
        num_rows,
        weight.shape[0],
        depth,
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[weight.dtype],
        DTYPE_CODES[out_dtype],
        _level_code(library, level),
        torch.get_num_threads(),
    )
    _raise_for_status(status)
    return out


class _DecodeLayer(ctypes.Structure):
    """LwzDecodeLayer of csrc/decode_layers.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attn_norm", "qkv_proj", "o_proj", "mlp_norm")),
        *((name, ctypes.c_void_p) for name in ("gate_up_proj", "down_proj", "qkv_bias")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "k_cache", "v_cache")),
    )


class _DecodeLayersCall(ctypes.Structure):
    """LwzDecodeLayersCall of csrc/decode_layers.h."""

    _fields_ = (
        ("layers", ctypes.POINTER(_DecodeLayer)),
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "page_table", "context_lens")),
        ("slots", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_layers", "batch", "hidden", "num_heads")),
        *((name, ctypes.c_int64) for name in ("num_kv_heads", "head_size", "ff")),
        *((name, ctypes.c_int64) for name in ("num_pages", "page_size", "max_pages")),
        *((name, ctypes.c_float) for name in ("norm_eps", "softmax_scale")),
        *((name, ctypes.c_int) for name in ("dtype", "level", "num_threads")),
    )


def decode_layers(
    x: torch.Tensor,
    layers: list[list[torch.Tensor | None]],
    k_caches: torch.Tensor,
    v_caches: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    norm_eps: float,
    softmax_scale: float,
    level: str | None = None,
) -> torch.Tensor:
    """Decoder layers, each the tensors of `DecodeLayer` in order, of contiguous CPU tensors."""
    library = _library()
    x = x.clone(memory_format=torch.contiguous_format)
    _, num_pages, page_size, num_kv_heads, head_size = k_caches.shape
    structures = (_DecodeLayer * len(layers))(
        *(
            _DecodeLayer(*map(_address, (*layer, k_cache, v_cache)))
            for layer, k_cache, v_cache in zip(layers, k_caches, v_caches, strict=True)
        )
    )
    down_proj = layers[0][5] if layers else None
    call = _DecodeLayersCall(
        structures,
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        page_table.data_ptr(),
        context_lens.data_ptr(),
        slot_mapping.data_ptr(),
        len(layers),
        *x.shape,
        num_heads,
        num_kv_heads,
        head_size,
        DEPTH_STEP if down_proj is None else down_proj.shape[1],
        num_pages,
        page_size,
        page_table.shape[1],
        norm_eps,
        softmax_scale,
        DTYPE_CODES[x.dtype],
        _level_code(library, level),
        torch.get_num_threads(),
    )
    _raise_for_status(library.lwz_decode_layers(ctypes.byref(call)))
    return x


class _Rows(ctypes.Structure):
    """LwzRows of csrc/attention.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    )


class _AttentionCall(ctypes.Structure):
    """LwzAttentionCall of csrc/attention.h."""

    _fields_ = (
        *((name, _Rows) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "lengths", "prefix_of")),
        *((name, ctypes.c_int64) for name in ("num_sequences", "num_heads", "num_kv_heads")),
        ("head_size", ctypes.c_int64),
        ("softmax_scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("level", "num_threads")),
    )


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    prefix_of: torch.Tensor,
    *,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of packed bf16 CPU tensors whose strides are even; see csrc/attention.h."""
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    tensors = {"q": q, "k": k, "v": v, "out": out}
    _call_attention("lwz_attention", tensors, lse, lengths, prefix_of, softmax_scale)
    return out, lse


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lengths: torch.Tensor,
    prefix_of: torch.Tensor,
    *,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of what `attention` was given and gave."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    tensors = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "dq": dq, "dk": dk, "dv": dv}
    _call_attention("lwz_attention_backward", tensors, lse, lengths, prefix_of, softmax_scale)
    return dq, dk, dv


def _call_attention(
    name: str,
    tensors: dict[str, torch.Tensor],
    lse: torch.Tensor,
    lengths: torch.Tensor,
    prefix_of: torch.Tensor,
    softmax_scale: float,
) -> None:
    library = _library()
    call = _AttentionCall(
        **{name: _Rows(x.data_ptr(), *x.stride()[:2]) for name, x in tensors.items()},
        lse=lse.data_ptr(),
        lengths=lengths.data_ptr(),
        prefix_of=prefix_of.data_ptr(),
        num_sequences=len(lengths),
        num_heads=tensors["q"].shape[1],
        num_kv_heads=tensors["k"].shape[1],
        head_size=tensors["q"].shape[2],
        softmax_scale=softmax_scale,
        level=library.lwz_best_level(),
        num_threads=torch.get_num_threads(),
    )
    _raise_for_status(getattr(library, name)(ctypes.byref(call)))


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    softmax_scale: float,
    level: str | None = None,
) -> torch.Tensor:
    """Paged attention of contiguous CPU tensors; `level=None` takes the best instruction set."""
    library = _library()
    batch, num_heads, head_size = q.shape
    num_pages, page_size, num_kv_heads, _ = k_cache.shape
    out = torch.empty_like(q)
    status = library.lwz_paged_attention(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        page_table.data_ptr(),
        context_lens.data_ptr(),
        out.data_ptr(),
        batch,
        num_heads,
        num_kv_heads,
        head_size,
        num_pages,
        page_size,
        page_table.shape[1],
        softmax_scale,
        DTYPE_CODES[q.dtype],
        _level_code(library, level),
        torch.get_num_threads(),
    )
    _raise_for_status(status)
    return out


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Copies rows of contiguous CPU tensors into the caches, in place; skips negative slots."""
    num_tokens, num_kv_heads, head_size = k.shape
    status = _library().lwz_store_kv(
        k.data_ptr(),
        v.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slot_mapping.data_ptr(),
        num_tokens,
        k_cache.shape[0] * k_cache.shape[1],
        num_kv_heads * head_size * k.element_size(),
        torch.get_num_threads(),
    )
    _raise_for_status(status)


def row_statistics(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    temperature_C: torch.Tensor,
    *,
    logit_scale: float,
    softcap: float | None,
    level: str | None = None,
) -> torch.Tensor:
    """max z, Σ exp(z − max), Σ exp(z − max)·(z − max) and z[label] of contiguous rows: [4, C]."""
    library = _library()
    num_rows, num_columns = logits_CV.shape
    out_4C = torch.empty(4, num_rows, dtype=torch.float32)
    status = library.lwz_row_statistics(
        logits_CV.data_ptr(),
        labels_C.data_ptr(),
        temperature_C.data_ptr(),
        out_4C.data_ptr(),
        num_rows,
        num_columns,
        logit_scale,
        math.inf if softcap is None else softcap,
        _level_code(library, level),
        torch.get_num_threads(),
    )
    _raise_for_status(status)
    return out_4C


def write_dlogits_(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    temperature_C: torch.Tensor,
    lse_C: torch.Tensor,
    entropy_C: torch.Tensor,
    dlogprobs_C: torch.Tensor,
    dentropy_C: torch.Tensor | None,
    dlse_C: torch.Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
    out_dtype: torch.dtype,
    level: str | None = None,
) -> torch.Tensor:
    """The logits' gradient in their own storage; bf16 rows take the first half of their row's."""
    library = _library()
    num_rows, num_columns = logits_CV.shape
    status = library.lwz_write_dlogits(
        logits_CV.data_ptr(),
        labels_C.data_ptr(),
        temperature_C.data_ptr(),
        lse_C.data_ptr(),
        entropy_C.data_ptr(),
        dlogprobs_C.data_ptr(),
        _address(dentropy_C),
        _address(dlse_C),
        num_rows,
        num_columns,
        logit_scale,
        math.inf if softcap is None else softcap,
        DTYPE_CODES[out_dtype],
        _level_code(library, level),
        torch.get_num_threads(),
    )
    _raise_for_status(status)
    return logits_CV.view(out_dtype)[:, :num_columns]


def adamw_(
    weights: torch.Tensor,
    lower: torch.Tensor | None,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    grad_scale: float,
    beta1: float,
    beta2: float,
    decay: float,
    step_size: float,
    inverse_correction: float,
    eps: float,
    level: str | None = None,
) -> None:
    """The step of csrc/adamw.h on contiguous CPU tensors, in place."""
    library = _library()
    status = library.lwz_adamw(
        weights.data_ptr(),
        _address(lower),
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        weights.numel(),
        grad_scale,
        beta1,
        beta2,
        decay,
        step_size,
        inverse_correction,
        eps,
        DTYPE_CODES[exp_avg.dtype],
        _level_code(library, level),
        torch.get_num_threads(),
    )
    _raise_for_status(status)


def vector_exp(x: torch.Tensor, level: str) -> torch.Tensor:
    """exp of a fp32 vector of values <= 0 as the attention kernel of `level` computes it."""
    if x.numel() % 16 != 0:
        raise ValueError(f"vector_exp: expected a multiple of 16 values, got {x.numel()}")
    library = _library()
    out = torch.empty_like(x)
    status = library.lwz_vector_exp(
        x.data_ptr(), out.data_ptr(), x.numel(), _level_code(library, level)
    )
    _raise_for_status(status)
    return out


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _level_code(library: ctypes.CDLL, level: str | None) -> int:
    return library.lwz_best_level() if level is None else LEVELS.index(level)


def _raise_for_status(status: int) -> None:
    if status == 0:
        return
    if status == _OUT_OF_MEMORY:
        raise MemoryError("native library: out of memory for intermediate results")
    raise ValueError(_STATUS_MESSAGES[status])


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the native library is not available: {reason}")
    return library


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not."""
    library, reason = load_shared_library(
        "lwz_kernels._native",
        "lwz_abi_version",
        ABI_VERSION,
        needs="install a C++ compiler and cmake, then run pip install . again",
        prepare=_share_openmp_runtime,
    )
    if library is not None:
        _declare(library)
    return library, reason


def _share_openmp_runtime() -> None:
    """Makes the GNU OpenMP runtime that PyTorch has loaded visible to our library."""
    path = _loaded_openmp_path() or _bundled_openmp_path() or "libgomp.so.1"
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _loaded_openmp_path() -> str | None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    return min(paths, default=None, key=lambda path: ("torch" not in path, path))


def _bundled_openmp_path() -> str | None:
    packages = Path(torch.__file__).parent.parent
    for folder in (packages / "torch" / "lib", packages / "torch.libs"):
        for path in sorted(folder.glob("libgomp*.so*")):
            return str(path)
    return None


def _declare(library: ctypes.CDLL) -> None:
    pointer, i64, i32, f64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    library.lwz_paged_attention.argtypes = [
        *[pointer] * 6,
        *[i64] * 7,
        ctypes.c_float,
        *[i32] * 3,
    ]
    library.lwz_adamw.argtypes = [*[pointer] * 5, i64, *[ctypes.c_float] * 7, *[i32] * 3]
    for name in ("attention", "attention_backward", "decode_layers"):
        getattr(library, f"lwz_{name}").argtypes = [pointer]
    library.lwz_linear.argtypes = [*[pointer] * 4, *[i64] * 3, *[i32] * 5]
    library.lwz_row_statistics.argtypes = [*[pointer] * 4, *[i64] * 2, *[f64] * 2, *[i32] * 2]
    library.lwz_write_dlogits.argtypes = [*[pointer] * 8, *[i64] * 2, *[f64] * 2, *[i32] * 3]
    library.lwz_store_kv.argtypes = [*[pointer] * 5, *[i64] * 3, i32]
    library.lwz_vector_exp.argtypes = [pointer, pointer, i64, i32]
    for name in (
        "adamw",
        "attention",
        "attention_backward",
        "best_level",
        "decode_layers",
        "linear",
        "paged_attention",
        "row_statistics",
        "store_kv",
        "vector_exp",
        "write_dlogits",
    ):
        getattr(library, f"lwz_{name}").restype = i32
