"""Latents are decoded as stock diffusers decodes them."""

from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor

from lightning_modules.networks.decoder import LatentDecoder
from lightning_modules.networks.loading import load_parts


def latents(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_pictures_are_the_pipelines(tiny_sd: Path) -> None:
    vae = load_parts(tiny_sd).vae
    with torch.no_grad():
        decoded = vae.decode(latents(3) / vae.config.scaling_factor).sample
        expected = VaeImageProcessor().postprocess(decoded, output_type="pt")
        pictures = LatentDecoder(vae).decode(latents(3))
    # not on all processors to the last bit
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-6)
    assert pictures.shape == (3, 3, 16, 16) and 0 <= pictures.min() < pictures.max() <= 1


def test_shift_factor_is_added_after_scaling(tiny_sd: Path) -> None:
    vae = load_parts(tiny_sd).vae
    plain = LatentDecoder(vae)
    with torch.no_grad():
        expected = plain.decode(latents(1) + 0.3 * vae.config.scaling_factor)
        vae.register_to_config(shift_factor=0.3)
        torch.testing.assert_close(plain.decode(latents(1)), expected)


def test_slices_do_not_matter_and_gradients_flow(tiny_sd: Path) -> None:
    vae = load_parts(tiny_sd).vae.double()
    leaf = latents(5).double().requires_grad_()
    whole, sliced = LatentDecoder(vae, 16).decode(leaf), LatentDecoder(vae, 2).decode(leaf)
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-6)  # float32 at the end, float64 before
    sliced.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in vae.parameters())


def test_decoder_is_in_evaluation_mode_and_not_stored(tiny_sd: Path) -> None:
    decoder = LatentDecoder(load_parts(tiny_sd).vae.bfloat16()).train()
    assert not any(module.training for module in decoder.modules())
    assert decoder.state_dict() == {}
    assert decoder.decode(latents(1)).dtype == torch.float32
