"""PyramidDrop: the last row's attention, in stages deeper and deeper. arXiv 2410.17247."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.reducers.fastv import FastV


@dataclass(frozen=True)
class PyramidDrop(FastV, name="pyramiddrop"):
    """Keep the tokens that the last prompt row attends to, on the mean of heads, at every stage.

    The rule is FastV's; the stages are the schedule's: ``foveate.recipe("pyramiddrop")`` keeps 1/2,
    1/4 and 1/8 of the original count from a quarter, a half and three quarters of the depth on,
    which is the released setting (after layers 8, 16 and 24 of 32).

    Where the released code (Cooperx521/PyramidDrop) is left: it ranks by the queries and keys of
    the *next* layer, made once more from the hidden states; here they are those of the layer just
    crossed, which were computed anyway. It numbers positions anew after each stage; here survivors
    keep their rotary values. Several images and any padding are fine (released: one image a prompt,
    padding on the right).
    """
