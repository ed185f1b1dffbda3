"""Networks and operations with complex numbers inside: Fourier neural operators, spectra, parts.

Weights are real pairs, which `network.to(torch.float32)` converts, unlike complex parameters.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from support.dual_oracle import Network, calls
from torch import Tensor, nn


class SpectralConvolution(nn.Module):
    """Weights for the low frequencies of a field, written into a spectrum of zeros (Li et al.
    2021).

    With a rank the weight is a Tucker product, contracted with the field factor by factor.
    """

    def __init__(self, channels: int, modes: tuple[int, ...], rank: int | None = None) -> None:
        super().__init__()
        self.modes = modes
        shape = (channels, channels, *modes)
        factors = [shape] if rank is None else [(rank,) * len(shape), *((n, rank) for n in shape)]
        self.factors = nn.ParameterList(0.3 * torch.randn(*factor, 2) for factor in factors)

    def forward(self, x: Tensor) -> Tensor:
        space = tuple(range(2, x.ndim))
        shift = partial(torch.fft.fftshift, dim=space[:-1]) if len(space) > 1 else torch.clone
        spectrum = shift(torch.fft.rfftn(x, dim=space, norm="forward"))
        low = (slice(None), slice(None), *(slice(1, 1 + mode) for mode in self.modes))
        out = torch.zeros(spectrum.shape, dtype=spectrum.dtype, device=x.device)
        out[low] = self._contract(spectrum[low])
        return torch.fft.irfftn(shift(out), s=x.shape[2:], dim=space, norm="forward")

    def _contract(self, x: Tensor) -> Tensor:
        first, *others = (torch.view_as_complex(factor.data) for factor in self.factors)
        positions = "xyz"[: len(self.modes)]
        if not others:
            return torch.einsum(f"ni{positions},io{positions}->no{positions}", x, first)
        x = torch.tensordot(x, others[0], dims=([1], [0]))  # [n, *positions, r]
        letters = f"rs{'uvw'[: len(self.modes)]}"
        sides = ",".join(f"{p}{r}" for p, r in zip(positions, letters[2:], strict=True))
        formula = f"n{positions}r,{letters},os,{sides}->no{positions}"
        return torch.einsum(formula, x, first, *others[1:])


class FourierOperator(nn.Module):
    """Lift, a spectral convolution beside a pointwise one, and projection."""

    def __init__(self, modes: tuple[int, ...], rank: int | None = None) -> None:
        super().__init__()
        convolution = nn.Conv1d if len(modes) == 1 else nn.Conv2d
        self.lift = convolution(1, 3, 1)
        self.spectral = SpectralConvolution(3, modes, rank)
        self.pointwise = convolution(3, 3, 1)
        self.project = convolution(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        return self.project(F.gelu(self.spectral(x) + self.pointwise(x)))


SPECTRAL = {
    "fourier_operator_1d": Network(lambda: FourierOperator((4,)), (1, 13)),
    "fourier_operator_2d": Network(lambda: FourierOperator((4, 3)), (1, 9, 11)),
    "fourier_operator_tucker": Network(lambda: FourierOperator((4, 3), rank=2), (1, 9, 11)),
}


def _pair(x: Tensor) -> Tensor:
    return torch.complex(x, x.sin())


def _both(z: Tensor) -> Tensor:
    return torch.view_as_real(z).flatten(-2)


def _written_in_parts(x: Tensor) -> Tensor:
    """Views of the real and imaginary part share memory with the spectrum."""
    z = torch.zeros(x.shape, dtype=torch.complex(x[:1], x[:1]).dtype)
    z.real[:, 1:] = x[:, :4]
    z.imag = x * 2
    torch.view_as_real(z)[..., 0] *= x.cos()
    conjugate = z.conj().resolve_conj()
    conjugate[:, 0] += 1j
    return _both(z * conjugate) + z.conj().imag.sum() - z.conj().real.sum()


def _cloned(x: Tensor, template: Tensor) -> Tensor:
    """A tensor from outside becomes one of the forward pass by a copy."""
    out = template.to(x.dtype).clone()
    out[1:3] = x[0, 1:3]
    return x * out


COMPLEX = {
    "fft_of_batch": calls(
        lambda x: _both(torch.fft.fft2(x)) + torch.fft.ihfft(x, dim=1).abs().sum()
    ),
    "spectrum_of_spectrum": calls(lambda x: torch.fft.hfft(torch.fft.fftn(_pair(x)), n=7)),
    "spectrum_of_constants": calls(
        lambda x: (
            x * torch.fft.hfft(torch.arange(8.0).to(x) * (1 + 1j), n=7)
            + x * torch.fft.hfft(torch.zeros(4, dtype=torch.complex128) + 1j, n=7).to(x)
        )
    ),
    "written_in_parts": calls(_written_in_parts),
    "cloned": calls(lambda x: _cloned(x, torch.arange(35.0).view(5, 7))),
    "size_and_angle": calls(
        lambda x: _pair(x).abs() + _pair(x).angle() + _both(torch.polar(x, x * 2)).sum()
    ),
    "of_complex": calls(
        lambda x: _both(_pair(x).exp() + (_pair(x) + 3).sqrt().reciprocal() + _pair(x).square())
    ),
    "complex_products": calls(
        lambda x: _both(
            _pair(x) @ _pair(x.mT) / (4 + 3j) + torch.vdot(_pair(x)[0, 0], _pair(x)[1, 1])
        )
    ),
    "complex_and_real": calls(
        lambda x: _both(x * _pair(x).sum() + (1 + 2j) * x - _pair(x).mean(1, keepdim=True))
    ),
    "complex_spread": calls(lambda x: _pair(x).var(1) + _pair(x).norm(dim=1)),
    "complex_activation": calls(lambda x: _both(_pair(x).tanh())),
}
