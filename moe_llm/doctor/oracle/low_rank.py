"""Low-rank adapters: W + s B A, and the factors' gradients (Hu et al. 2022, section 4.1). Stacked matrices one by one."""

import numpy as np


def merged(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """W + s B A. weight: (..., O, I); a: (..., r, I); b: (..., O, r)."""
    change = np.einsum("...or,...ri->...oi", b.astype(np.float64), a.astype(np.float64))
    return (weight + scale * change).astype(np.float32)


def factor_gradients(slope: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Of A and of B, from the gradient of the merged weight: dA = s B^T dW and dB = s dW A^T."""
    return (
        scale * np.einsum("...or,...oi->...ri", b, slope),
        scale * np.einsum("...oi,...ri->...or", slope, a),
    )
