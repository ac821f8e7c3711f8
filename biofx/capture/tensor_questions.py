"""What Python may ask of a tensor while a forward is recorded, by the names of the functions that ask."""

from __future__ import annotations

DEVICES = frozenset({"device", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu"})
"""Where a tensor is."""
DESCRIBING = frozenset({"device", "dtype", "itemsize", "nbytes"})
"""Attributes that a graph reads anew: of what type a tensor is, where, and how many bytes it takes."""
NUMBERS = frozenset({"get_device", "element_size"})
"""The same as numbers, from methods."""
KINDS = frozenset({"can_cast", "is_complex", "is_floating_point", "is_signed"})
"""Questions about its type, whose answer a graph checks."""
SIZES = frozenset({"size", "numel", "nelement", "__len__"})
"""How large it is: known while a graph is written, as a node."""
DECIDING = frozenset(
    {
        *("__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__", "item", "tolist"),
        *(
            "numpy",
            "__array__",
            "is_nonzero",
            "equal",
            "allclose",
            "__dlpack__",
            "untyped_storage",
            "storage",
        ),
        *("requires_grad_", "retain_grad", "register_hook", "backward", "stride", "data_ptr"),
    }
)
"""What is in it, or in its gradient: what Python does next then depends on values."""
DESCRIPTIONS = frozenset(
    {
        *("__format__", "__hash__", "__repr__", "__str__", "dim", "ndimension", "element_size", "get_device"),
        *(
            "is_complex",
            "is_contiguous",
            "is_floating_point",
            "is_signed",
            "is_inference",
            "is_conj",
            "is_neg",
        ),
        *("is_same_size", "result_type", "can_cast", "promote_types", "has_names", "is_tensor", "is_storage"),
        *("storage_offset", "type", "is_pinned", "is_shared", "is_set_to"),
    }
)
"""What it is, which no value changes."""
