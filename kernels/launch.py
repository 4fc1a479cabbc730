"""Launch a Triton kernel again and again without Triton's binder.

The binder looks at every argument of every launch to find the compiled kernel: about 50 us of
Python where a launch takes 10. Here the kernel is kept by what it depends on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

ALIGNMENT = 16
"""Bytes; Triton compiles another kernel for pointers that are not aligned."""


class Launcher:
    """Launches one kernel. Arguments go by position: tensors, `tl.constexpr`s and integers.

    Integers that are no `tl.constexpr` must be in the kernel's `do_not_specialize`.
    """

    def __init__(self, kernel: Any, warps: int = 4) -> None:
        """Launch `kernel`, a `triton.jit` function, with so many warps a program."""
        self._kernel, self._warps = kernel, warps
        self._compiled: dict[tuple[Any, ...], Any] = {}
        # The interpreter's functions have no parameters.
        self._free = frozenset(
            i for i, p in enumerate(getattr(kernel, "params", ())) if p.do_not_specialize
        )

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launch on the current stream of the first argument's device, which is the current one."""
        key: tuple[Any, ...] = (
            arguments[0].device,
            *(
                (a.dtype, a.data_ptr() % ALIGNMENT == 0) if isinstance(a, Tensor) else a
                for i, a in enumerate(arguments)
                if i not in self._free
            ),
        )
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments)
            return
        compiled = self._kernel[grid](*arguments, num_warps=self._warps)
        if compiled is not None:
            self._compiled[key] = compiled
