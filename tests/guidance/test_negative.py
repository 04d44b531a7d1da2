"""Negative prompts by attention: against a slow reference, on stock pipelines of every supported kind."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    LCMScheduler,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.errors import UserError
from lightning_modules.diffusion.condition import Condition
from lightning_modules.guidance import negative_attention, negative_prompting
from lightning_modules.guidance.methods import Method, Nag, Nasa, make_method
from lightning_modules.guidance.prompting import pipeline_network
from tests.guidance import reference
from tests.guidance.conftest import draw, network_of, recorded

RULES: dict[str, Method] = {"nasa": Nasa(0.6), "nag": Nag(4.0, 1.2, 0.4)}
PROMPTS, SEEDS = ["a red cat", "a dog on"], [5, 6]


def options(rule: Method) -> dict[str, Any]:
    """The rule as keywords of negative_prompting."""
    if isinstance(rule, Nasa):
        return {"method": "nasa", "scale": rule.scale}
    return {"method": "nag", "scale": rule.scale, "tau": rule.tau, "alpha": rule.alpha}


def encode(pipe: Any, texts: list[str]) -> tuple[Tensor, Tensor | None]:
    """Embeddings and mask, by the pipeline's own encoder, as it encodes prompts."""
    given: dict[str, Any] = {"prompt": texts, "device": "cpu", "num_images_per_prompt": 1}
    names = inspect.signature(pipe.encode_prompt).parameters
    given |= {name: None for name in ("prompt_2", "prompt_3") if name in names}
    if "do_classifier_free_guidance" in names:
        given["do_classifier_free_guidance"] = False
    if "max_sequence_length" in names:
        given["max_sequence_length"] = 12
    output = pipe.encode_prompt(**given)
    return output[0], output[1] if "prompt_attention_mask" in names else None


def expected(pipe: Any, inputs: dict[str, Any], negatives: list[str], rule: Method) -> Tensor:
    """The network's output for what a stock call gave it, by the reference."""
    network = network_of(pipe)
    negative, mask = encode(pipe, negatives)
    inputs = {name: value for name, value in inputs.items() if name != "joint_attention_kwargs"}
    if "img_ids" in inputs:
        return reference.flux(network, inputs, negative, rule)
    if "pooled_projections" in inputs:
        return reference.sd3(network, inputs, negative, rule)
    return reference.cross_attention_network(network, inputs, negative, mask, rule)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@torch.no_grad()
def test_the_network_computes_what_the_equations_say(pipe: Any, rule: Method) -> None:
    negatives = ["dog", "a red cat on"]
    with recorded(pipe) as calls:
        plain = draw(pipe, PROMPTS, SEEDS)
        with negative_prompting(pipe, negatives, **options(rule)):
            steered = draw(pipe, PROMPTS, SEEDS)
    (inputs, stock), (_, output) = calls
    torch.testing.assert_close(output, expected(pipe, inputs, negatives, rule), rtol=0, atol=1e-5)
    assert (output - stock).abs().max() > 1e-3
    assert (steered - plain).abs().max() > 1e-3
    torch.testing.assert_close(draw(pipe, PROMPTS, SEEDS), plain, rtol=0, atol=0)


def test_off_is_the_stock_pipeline_bit_for_bit(pipe: Any) -> None:
    plain, former = draw(pipe, PROMPTS, SEEDS), network_of(pipe).attn_processors
    for negative, scale in (("dog", 0.0), ("", 0.5), (None, 0.5), (["", None], 0.5)):
        for method in ("nasa", "nag"):
            with negative_prompting(pipe, negative, method=method, scale=scale):
                assert network_of(pipe).attn_processors == former
                assert torch.equal(draw(pipe, PROMPTS, SEEDS), plain)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_images_of_a_batch_have_their_own_negative_prompts(pipe: Any, rule: Method) -> None:
    prompts, seeds, negatives = [*PROMPTS, "a cat"], [5, 6, 7], ["dog", None, "red"]
    plain = draw(pipe, prompts, seeds)
    with negative_prompting(pipe, negatives, **options(rule)):
        together = draw(pipe, prompts, seeds)
    if not hasattr(network_of(pipe), "context_embedder"):
        assert torch.equal(together[1], plain[1])  # joint attention: other matrix sizes, so to rounding
    for i, negative in enumerate(negatives):
        with negative_prompting(pipe, negative, **options(rule)):
            alone = draw(pipe, prompts[i : i + 1], seeds[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=3e-4)
    assert (together[0] - plain[0]).abs().max() > 1e-3


def test_several_images_per_prompt(pipe: Any) -> None:
    """Per image or per prompt; one negative prompt serves all."""
    seeds = [1, 2, 3, 4]
    four = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    for given, each in ((["dog", "red"], ["dog", "dog", "red", "red"]), (["dog", "", "red", "on"],) * 2):
        with negative_prompting(pipe, given, scale=0.5):
            several = draw(pipe, PROMPTS, seeds, num_images_per_prompt=2)
        with negative_prompting(pipe, each, scale=0.5):
            torch.testing.assert_close(several, draw(pipe, four, seeds), rtol=1e-4, atol=1e-4)
    with (
        negative_prompting(pipe, ["dog"] * 3, scale=0.5),
        pytest.raises(UserError, match="3 negative prompts for 2 images of 2 prompts"),
    ):
        draw(pipe, PROMPTS, SEEDS)


def test_everything_is_restored_after_an_exception_and_nesting_is_refused(pipe: Any) -> None:
    kind, former, attributes = type(pipe), network_of(pipe).attn_processors, dict(vars(pipe))
    with pytest.raises(RuntimeError, match="mine"), negative_prompting(pipe, "dog", scale=0.5):
        for scale in (0.0, 0.5):
            with pytest.raises(UserError, match="already"), negative_prompting(pipe, "red", scale=scale):
                pass
        draw(pipe, PROMPTS, SEEDS)
        raise RuntimeError("mine")
    assert type(pipe) is kind and vars(pipe).keys() == attributes.keys()
    after = network_of(pipe).attn_processors
    assert all(after[name] is former[name] for name in former) and after.keys() == former.keys()


def test_own_guidance_is_off_inside(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["pixart"]  # its default is 4.5
    given: dict[str, Any] = {
        "prompt": "a cat", "num_inference_steps": 1, "output_type": "latent",
        "use_resolution_binning": False, "height": 16, "width": 16, "clean_caption": False,
    }  # fmt: skip
    with negative_prompting(pipe, "dog", scale=0.5):
        off, default = (
            pipe(**given, **more, generator=torch.Generator().manual_seed(0)).images
            for more in ({"guidance_scale": 1.0}, {})
        )
        assert torch.equal(off, default)
        with pytest.raises(UserError, match="guidance_scale is 4.5"):
            pipe(**given, guidance_scale=4.5)
    with (
        negative_prompting(pipelines["flux"], "dog", scale=0.5),
        pytest.raises(UserError, match="true_cfg_scale is 2"),
    ):
        draw(pipelines["flux"], PROMPTS, SEEDS, true_cfg_scale=2.0, negative_prompt=["red", "red"])


def test_few_step_sampler_and_keys_computed_once(pipelines: dict[str, Any]) -> None:
    """In three steps of LCM's sampler, keys of the prompt are computed thrice, of the negative one once."""
    pipe = copy.copy(pipelines["sd"])
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    layer = next(m for n, m in pipe.unet.named_modules() if n.endswith("attn2.to_k"))
    sizes: list[int] = []
    handle = layer.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    with negative_prompting(pipe, "dog", scale=0.5), recorded(pipe) as calls:
        draw(pipe, PROMPTS, SEEDS, steps=3)
        assert sorted(sizes) == [1, 2, 2, 2]
        draw(pipe, PROMPTS, SEEDS, steps=1)
        assert sorted(sizes) == [1, 1, 2, 2, 2, 2]
    handle.remove()
    for inputs, output in calls:
        torch.testing.assert_close(output, expected(pipe, inputs, ["dog"], Nasa(0.5)), rtol=0, atol=1e-5)


@torch.no_grad()
def test_in_the_first_steps_only(pipe: Any) -> None:
    """The first network call of every drawing is steered, the second one is the stock network's."""
    rule = RULES["nasa"]
    with recorded(pipe) as stock:
        draw(pipe, PROMPTS, SEEDS)
    with recorded(pipe) as calls, negative_prompting(pipe, "dog", **options(rule), steps=1):
        for _ in range(2):
            draw(pipe, PROMPTS, SEEDS, steps=2)
    steered = expected(pipe, stock[0][0], ["dog"], rule)
    for _, output in calls[::2]:
        torch.testing.assert_close(output, steered, rtol=0, atol=1e-5)
    for inputs, output in calls[1::2]:
        torch.testing.assert_close(network_of(pipe)(**inputs)[0], output, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="first 0 steps"), negative_prompting(pipe, "dog", steps=0):
        pass


def condition(length: int, seed: int, count: int = 2) -> Condition:
    text = torch.randn(count, length, 16, generator=torch.Generator().manual_seed(seed))
    return Condition({"encoder_hidden_states": text}, {"encoder_hidden_states": text[:1]})


def unet_output(unet: Any) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    output: Tensor = unet(x, 500, condition(9, 1).tensors["encoder_hidden_states"])[0]
    return output


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_network_alone_other_text_length_and_gradients(pipelines: dict[str, Any], rule: Method) -> None:
    """Weights' gradients flow through both branches; checkpointing changes none of them."""
    unet, negative = copy.deepcopy(pipelines["sd"].unet).train(), condition(5, 2)
    text = negative.tensors["encoder_hidden_states"]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"sample": x, "timestep": 500, **condition(9, 1).tensors}
    gradients = []
    for kind in ("reference", "plain", "checkpointed"):
        unet.zero_grad()
        if kind == "reference":
            output = reference.cross_attention_network(unet, given, text, None, rule)
            output.square().sum().backward()
        else:
            if kind == "checkpointed":
                unet.enable_gradient_checkpointing()
            with negative_attention(unet, negative, rule):
                unet_output(unet).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None})
    wanted, plain, checkpointed = gradients
    assert wanted.keys() == plain.keys() == checkpointed.keys()
    for name in wanted:
        torch.testing.assert_close(plain[name], wanted[name], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-5)
    with negative_attention(unet, negative, rule):
        late = unet_output(unet).sum()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        late.backward()  # silently wrong gradients would be worse


def test_pixart_trains_its_caption_projection_through_the_negative_text(pipelines: dict[str, Any]) -> None:
    network, rule = copy.deepcopy(pipelines["pixart"].transformer).train(), Nasa(0.5)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    negative = Condition(
        {**condition(5, 2).tensors, "encoder_attention_mask": mask},
        {**condition(5, 2).null, "encoder_attention_mask": mask[:1]},
    )
    given = {"hidden_states": x, "timestep": torch.tensor([500, 500]), **condition(9, 1).tensors}
    text = negative.tensors["encoder_hidden_states"]
    output = reference.cross_attention_network(network, given, text, mask, rule)
    parameters = [p for n, p in network.named_parameters() if "caption" in n or "attn2.to_k" in n]
    wanted = torch.autograd.grad(output.square().sum(), parameters)
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()
        with negative_attention(network, negative, rule):
            again = network(**given)[0]
            found = torch.autograd.grad(again.square().sum(), parameters)
        torch.testing.assert_close(again, output, rtol=0, atol=1e-5)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_network_alone_with_some_negatives(pipelines: dict[str, Any]) -> None:
    unet = pipelines["sd"].unet
    with torch.no_grad():
        plain = unet_output(unet)
        with negative_attention(unet, condition(5, 2, 1), Nasa(0.5), torch.tensor([True, False])):
            some = unet_output(unet)
        with negative_attention(unet, condition(5, 2, 1), Nasa(0.5)):
            every = unet_output(unet)
    assert torch.equal(some[1], plain[1])
    torch.testing.assert_close(some[0], every[0], rtol=0, atol=0)
    assert not torch.equal(some[0], plain[0])
    with (
        negative_attention(unet, condition(5, 2, 3), Nasa(0.5)),
        pytest.raises(UserError, match="3 negative prompts do not fit a batch of 2"),
    ):
        unet_output(unet)


@torch.no_grad()
def test_a_whole_network_that_was_compiled_before() -> None:
    """Stock, NASA, NAG and stock again; one attention block, for tracing takes seconds for each."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,),
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None, cross_attention_dim=16, attention_head_dim=2,
    ).eval()  # fmt: skip
    for parameter in unet.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    found = []
    for network in (unet, torch.compile(copy.deepcopy(unet), backend="eager")):
        outputs = [unet_output(network)]
        for rule in RULES.values():
            with negative_attention(network, condition(5, 2), rule):
                outputs.append(unet_output(network))
        found.append([*outputs, unet_output(network)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)
    stock, nasa, nag, again = found[0]
    assert torch.equal(stock, again)
    for one, other in ((stock, nasa), (stock, nag), (nasa, nag)):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_compiled_equals_eager(pipelines: dict[str, Any], rule: Method) -> None:
    """A network compiled before notices that processors come and go; two calls inside, as in two steps."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=16).eval()
    compiled = torch.compile(copy.deepcopy(block), backend="eager")
    x, text, some = torch.randn(2, 6, 16), torch.randn(2, 9, 16), torch.tensor([True, False])

    def outputs(network: Any) -> list[Tensor]:
        found = [network(x, encoder_hidden_states=text)]
        with negative_attention(network, condition(5, 2), rule, some):
            found += [network(x, encoder_hidden_states=text) for _ in range(2)]
        return [*found, network(x, encoder_hidden_states=text)]

    with torch.no_grad():
        eager, again = outputs(block), outputs(compiled)
    for ours, theirs in zip(again, eager, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(eager[0], eager[1])
    pipe = copy.copy(pipelines["sd"])
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert pipeline_network(pipe) is pipelines["sd"].unet


def test_bad_input(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["sd"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"scale": float("nan")}, "not a finite number"),
        ({"scale": float("inf")}, "not a finite number"),
        ({"scale": -0.5}, "at least 0"),
        ({"method": "cfg"}, "'cfg' is not known"),
        ({"tau": 2.0}, "no effect with nasa"),
        ({"method": "nag", "tau": 0.0}, "tau above 0"),
        ({"method": "nag", "alpha": 1.5}, "alpha from 0 to 1"),
        ({"negative_prompt": []}, "a list with one per image"),
        ({"negative_prompt": [3]}, "a list with one per image"),
    ]
    for given, message in cases:
        words = {"negative_prompt": "x", **given}
        with pytest.raises(UserError, match=message), negative_prompting(pipe, **words):
            pass
    with negative_prompting(pipe, "dog"), pytest.raises(UserError, match="No prompt was encoded"):
        unet_output(pipe.unet)
    other = copy.copy(pipe)
    other.unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(UserError, match="no cross-attention or joint"), negative_prompting(other, "x"):
        pass
    with (
        pytest.raises(UserError, match="UNet2DModel has no cross-attention or joint attention"),
        negative_attention(other.unet, condition(5, 2), Nasa(0.5)),
    ):
        pass
    sliced = copy.copy(pipe)
    sliced.unet = copy.deepcopy(pipe.unet)
    sliced.unet.set_attention_slice(1)
    with pytest.raises(UserError, match="SlicedAttnProcessor"), negative_prompting(sliced, "x"):
        pass


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@torch.no_grad()
def test_sana_equals_the_reference(rule: Method) -> None:
    """Queries and keys normed over all heads, captions projected and normed, masks on both texts."""
    torch.manual_seed(0)
    network = SanaTransformer2DModel(
        sample_size=4, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=24,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    for parameter in network.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 4), "timestep": torch.tensor([10.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }  # fmt: skip
    text, mask = torch.randn(2, 3, 24), torch.tensor([[1, 1, 0], [1, 0, 0]])
    tensors = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    negative = Condition(tensors, {name: x[:1] for name, x in tensors.items()})
    plain = network(**inputs, return_dict=False)[0]
    with negative_attention(network, negative, rule):
        steered = network(**inputs, return_dict=False)[0]
    expected = reference.cross_attention_network(network, {**inputs, "return_dict": False}, text, mask, rule)
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
    assert (steered - plain).abs().max() > 1e-2


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", ["flux2", "qwen"])
def test_joint_attention_equals_the_reference_in_training(name: str, rule: Method) -> None:
    """Outputs and gradients of FLUX.2 and Qwen-Image, texts of different lengths; also with checkpoints."""
    torch.manual_seed(0)
    if name == "flux2":
        network: Any = Flux2Transformer2DModel(
            in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=12, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
        )  # fmt: skip
    else:
        network = QwenImageTransformer2DModel(
            in_channels=8, out_channels=2, num_layers=2, attention_head_dim=12, num_attention_heads=2,
            joint_attention_dim=12, axes_dims_rope=(4, 4, 4),
        )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(2, 4, 8), "timestep": torch.tensor([0.1, 0.9]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
    }  # fmt: skip
    text, mask = torch.randn(2, 3, 12), torch.tensor([[1, 1, 0], [1, 0, 0]])
    if name == "flux2":
        zero, two = torch.arange(1), torch.arange(2)
        inputs["img_ids"] = torch.cartesian_prod(zero, two, two, zero)
        inputs["txt_ids"] = torch.cartesian_prod(zero, zero, zero, torch.arange(5))
        tensors = {"encoder_hidden_states": text}
        expected = reference.flux2(network, inputs, text, rule)
    else:
        inputs["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
        inputs["img_shapes"] = [[(1, 2, 2)]] * 2
        tensors = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        expected = reference.qwen(network, inputs, text, mask.bool(), rule)
    negative = Condition(tensors, {key: x[:1] for key, x in tensors.items()})
    parameters = [
        p for key, p in network.named_parameters() if "to_q" in key or "k_proj" in key or "in." in key
    ]
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    plain = network(**inputs, return_dict=False)[0]
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()
        with negative_attention(network, negative, rule):
            steered = network(**inputs, return_dict=False)[0]
            found = torch.autograd.grad(steered.square().sum(), parameters)
        torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    assert (steered - plain).abs().max() > 1e-2
    assert torch.equal(network(**inputs, return_dict=False)[0], plain)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_one_stream_equals_the_reference_in_training(rule: Method) -> None:
    """Outputs and gradients of Z-Image, texts of different lengths; also with checkpoints."""
    torch.manual_seed(0)
    network: Any = ZImageTransformer2DModel(
        in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[4, 4, 4], axes_lens=[160, 16, 16],
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    texts, negatives = ([torch.randn(length, 12) for length in lengths] for lengths in ((5, 40), (34, 3)))
    inputs = [torch.randn(4, 1, 8, 8) for _ in texts], torch.tensor([0.1, 0.9]), texts
    padded, mask = (
        pad_sequence(rows, batch_first=True) for rows in (negatives, [x.new_ones(len(x)) for x in negatives])
    )
    tensors = {"encoder_hidden_states": padded, "encoder_attention_mask": mask}
    negative = Condition(tensors, {key: x[:1] for key, x in tensors.items()})
    parameters = [p for key, p in network.named_parameters() if key.startswith(("layers", "cap", "noise"))]

    def drawn() -> Tensor:
        return torch.stack(network(*inputs, return_dict=False)[0])

    expected, plain = reference.z_image(network, inputs, negatives, rule), drawn()
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()
        with negative_attention(network, negative, rule):
            steered = drawn()
            found = torch.autograd.grad(steered.square().sum(), parameters)
        torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
    assert (steered - plain).abs().max() > 1e-2
    assert torch.equal(drawn(), plain)


def test_defaults_are_the_papers(pipelines: dict[str, Any]) -> None:
    def network(**changes: Any) -> Any:
        unet = copy.copy(pipelines["sd"].unet)
        unet._internal_dict = {**unet.config, **changes}
        return unet

    assert make_method("nasa", network(cross_attention_dim=768)) == Nasa(0.1)
    assert make_method("nasa", network(cross_attention_dim=1024)) == Nasa(0.2)
    assert make_method("nasa", pipelines["pixart"].transformer) == Nasa(0.5)
    assert make_method("nasa", network(cross_attention_dim=128)) == Nasa(0.4)  # the bundled models
    assert make_method("nasa", pipelines["flux"].transformer) == Nasa(0.2)
    for width in (768, 1024, 128):
        assert make_method("nag", network(cross_attention_dim=width)) == Nag(2.0, 2.5, 0.375)
    for name, settings in {
        "sdxl": (2.0, 2.5, 0.5), "pixart": (4.0, 2.5, 0.375), "sd3": (4.0, 2.5, 0.125),
        "flux": (4.0, 2.5, 0.25),
    }.items():  # fmt: skip
        assert make_method("nag", network_of(pipelines[name])) == Nag(*settings)
    with torch.device("meta"):
        sana = SanaTransformer2DModel(num_layers=1)
    assert make_method("nag", sana) == Nag(4.0, 2.5, 0.375) and make_method("nasa", sana) == Nasa(0.4)
    assert make_method("nag", pipelines["flux"].transformer, 3, 1.5, 0.5) == Nag(3.0, 1.5, 0.5)


def test_nag_in_half_precision_stays_finite_and_bounded() -> None:
    """Zero tokens, values near the largest, and equal ones."""
    torch.manual_seed(0)
    plus, minus = torch.randn(1, 5, 64), torch.randn(1, 5, 64)
    plus[0, 0] = 0
    minus[0, 1] = plus[0, 1]
    plus[0, 2] *= 15000
    minus[0, 2] *= 15000
    plus[0, 3] = minus[0, 3] = 0
    for dtype in (torch.float16, torch.float32):
        result = Nag(8.0, 1.2, 1.0)(plus.to(dtype), minus.to(dtype))
        assert result.dtype == dtype and torch.isfinite(result).all()
        assert (result.float().abs().sum(-1) <= 1.2 * plus.abs().sum(-1) * 1.01).all()
        torch.testing.assert_close(result[0, 1], plus[0, 1].to(dtype))
        assert not result[0, [0, 3]].any()
    torch.testing.assert_close(
        Nag(0.5, 100.0, 0.25)(plus, minus)[:, 4], plus[:, 4] + 0.125 * (plus - minus)[:, 4]
    )
