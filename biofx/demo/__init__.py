"""``biofx demo``: a plain and a rewritten network side by side, on data that scikit-learn brings along.

Without more, the networks learn one task after another, and the plain one loses the ability to; with
``--digits`` both learn to read handwritten digits once. Nothing is downloaded.
"""

from biofx.demo.command import run_demo, run_digits
from biofx.demo.digits import Block, DigitNet

__all__ = ["Block", "DigitNet", "run_demo", "run_digits"]
