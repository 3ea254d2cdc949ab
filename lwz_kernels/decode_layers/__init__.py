"""All layers of a decoder for one new token of each sequence, in one call (decoding on a CPU)."""

from lwz_kernels.decode_layers.api import DecodeLayer, can_run_native, decode_layers

__all__ = ["DecodeLayer", "can_run_native", "decode_layers"]
