"""Models made ready for inference answer as before."""

import copy
import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForImageClassification

from modeling_lvvit import LVViTBackbone, LVViTForImageClassification, LVViTModel
from modeling_lvvit.deployment import ConvolutionLinear, Int8Linear, prepare_for_cpu, prepare_for_inference
from support.models import tiny_config


@pytest.fixture
def trained(tiny_model) -> LVViTForImageClassification:
    """Batch norms with statistics, scales and shifts of their own, residual branches divided by 2."""
    generator = torch.Generator().manual_seed(1)
    for module in tiny_model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return tiny_model.eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 48, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("settings", [{}, {"residual_divisor": 3.0}, {"conv_stem": False}, {"qkv_bias": True}])
def test_fused_model_gives_the_same_outputs(settings):
    torch.manual_seed(0)
    model = LVViTForImageClassification(tiny_config(**settings))
    model.train()(images(8))  # running statistics
    model.eval()
    before = copy.deepcopy(model.state_dict())
    fused = model.fuse()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    assert all(layer.branch_scale == 1 for layer in fused.lvvit.layers)
    with torch.no_grad():
        ours, theirs = model(images()), fused(images())
    for name in ("logits", "cls_logits", "patch_logits"):
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=1e-6)
    assert not model.config.fused
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model_class", [LVViTModel, LVViTBackbone])
def test_backbone_and_backbone_fuse_too(model_class):
    torch.manual_seed(0)
    model = model_class(tiny_config()).eval()
    with torch.no_grad():
        ours, theirs = model(images())[0], model.fuse()(images())[0]
    ours, theirs = (value[0] if isinstance(value, tuple) else value for value in (ours, theirs))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_fused_model_is_saved_and_loaded(trained, tmp_path):
    fused = trained.fuse()
    fused.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(images()).logits, fused(images()).logits)
        assert torch.equal(loaded.fuse()(images()).logits, fused(images()).logits)  # once is enough


def test_weights_are_folded_in_float32(trained):
    exact = trained.fuse().bfloat16().state_dict()
    coarse = copy.deepcopy(trained).bfloat16().fuse().state_dict()
    assert {value.dtype for value in coarse.values()} == {torch.bfloat16}
    for name, value in exact.items():
        torch.testing.assert_close(coarse[name], value, rtol=0.03, atol=0.03)


def test_prepared_model_needs_no_compiler(trained):
    prepared = prepare_for_inference(trained, compile_model=False)
    outputs = prepared(images())
    assert not outputs.logits.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(outputs.logits, trained(images()).logits, rtol=1e-4, atol=1e-6)
    outputs = prepare_for_inference(trained, torch.bfloat16, compile_model=False)(images())
    assert (outputs.cls_logits.dtype, outputs.logits.dtype) == (torch.bfloat16, torch.float32)


def test_preparation_is_counted_in_the_model_and_its_copy():
    model = LVViTForImageClassification(tiny_config(num_hidden_layers=3, residual_divisor=2.0)).eval()
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    plain = prepare_for_inference(model, torch.bfloat16, compile_model=False).preparation
    assert (plain.batch_norms, plain.residual_branches, plain.channels_last_convolutions) == (norms, 6, convolutions)
    assert (plain.int8_layers, plain.dtype, plain.attention) == (0, torch.bfloat16, "eager")
    assert f"batch norms folded into convolutions: {norms}; residual branches with their divisor folded in: 6" in str(
        plain
    )
    assert "bfloat16" in str(plain) and "not compiled" in str(plain) and "8 bits" not in str(plain)
    linear_layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    small = prepare_for_inference(model.fuse(), compile_mode="max-autotune", int8_weights=True).preparation
    assert (small.was_fused, small.batch_norms, small.residual_branches) == (True, 0, 0)
    assert str(small).startswith("fused before; float32") and f"linear layers with 8 bits: {linear_layers};" in str(
        small
    )
    assert "compiled at the first call with mode max-autotune" in str(small)


def test_preparation_is_logged(trained, caplog):
    with caplog.at_level(logging.INFO, "modeling_lvvit.deployment"):
        prepared = prepare_for_inference(trained, compile_model=False)
    assert [record.getMessage() for record in caplog.records] == [f"Prepared for inference: {prepared.preparation}"]


@pytest.fixture
def counter(monkeypatch) -> CompileCounterWithBackend:
    """Counts graphs, and does not spend time on machine code."""
    counter, compile_function = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_function(*args, **kwargs, backend=counter))
    torch._dynamo.reset()
    return counter


def test_batches_of_any_size_share_a_graph(trained, counter):
    prepared = prepare_for_inference(trained)
    with torch.no_grad():
        for count, graphs in ((3, 1), (5, 1), (8, 1), (2, 1), (1, 2), (7, 2)):
            torch.testing.assert_close(
                prepared(images(count)).logits, trained(images(count)).logits, rtol=1e-4, atol=1e-6
            )
            assert counter.frame_count == graphs
    assert isinstance(prepared, LVViTForImageClassification)


def test_many_models_can_be_prepared(trained, counter):
    for index in range(10):
        prepare_for_inference(trained)(images())
        assert counter.frame_count == index + 1


def test_prepared_model_takes_what_the_model_takes(trained, counter):
    prepared = prepare_for_inference(trained)
    other = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        for arguments in (
            {"labels": torch.tensor([1, 2, 3])},
            {"output_hidden_states": True},
            {"output_attentions": True},
            {"mix_mask": torch.ones(3, 4, 6, dtype=torch.bool)},
            {"return_dict": False},
            {"pixel_values": other, "interpolate_pos_encoding": True},
        ):
            arguments = {"pixel_values": images(), **arguments}
            ours, theirs = trained(**arguments), prepared(**arguments)
            logits = [outputs[0] if isinstance(outputs, tuple) else outputs.logits for outputs in (ours, theirs)]
            torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="doesn't match model"):
        prepared(other)
    with pytest.raises(ValueError, match="You have to specify pixel_values"):
        prepared()


@pytest.mark.slow
def test_packed_and_compiled_weights_give_the_same_logits(trained):
    torch._dynamo.reset()
    for dtype, options, tolerance in (
        (torch.float32, {}, 1e-5),
        (torch.bfloat16, {}, 0.02),
        (torch.float32, {"int8_weights": True}, 0.02),
    ):
        prepared = prepare_for_inference(trained, dtype, **options)
        with torch.no_grad():
            torch.testing.assert_close(prepared(images()).logits, trained(images()).logits, rtol=0.05, atol=tolerance)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bfloat16_attention_on_a_cpu_is_near_float32(trained, implementation):
    trained.set_attn_implementation(implementation)
    with torch.no_grad():
        exact, coarse = trained(images()).logits, copy.deepcopy(trained).bfloat16()(images()).logits
    torch.testing.assert_close(coarse.float(), exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_are_near_and_small(trained, dtype):
    prepared = prepare_for_inference(trained, dtype, int8_weights=True, compile_model=False)
    assert prepared.lvvit.layers[0].mlp.fc1.weight.dtype == torch.int8
    assert not any(isinstance(module, torch.nn.Linear) for module in prepared.modules())
    with torch.no_grad():
        exact = trained(images()).logits
    difference = (prepared(images()).logits - exact).abs().max()
    assert 0 < difference < 0.05 * exact.abs().max()
    with pytest.raises(ValueError, match="cannot be saved"):
        prepared.save_pretrained("nowhere")


def test_int8_layer_by_hand():
    """Weights are whole multiples of their largest / 127, inputs of theirs: nothing is lost."""
    linear = torch.nn.Linear(3, 2)
    linear.weight.data = torch.tensor([[127.0, -3.0, 0.0], [0.5, 0.25, 63.5]])
    linear.bias.data = torch.tensor([1.0, 2.0])
    tokens = torch.tensor([[[127.0, 1.0, -2.0], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(
        Int8Linear(linear)(tokens), torch.tensor([[[16127.0, -61.5], [1.0, 2.0]]]), rtol=1e-6, atol=0.3
    )


@pytest.mark.parametrize(("bf16", "implementation"), [(False, "sdpa"), (True, "eager")])
def test_model_prepared_for_the_cpu_gives_the_same_outputs(trained, bf16, implementation):
    prepared = prepare_for_cpu(copy.deepcopy(trained), torch.device("cpu"), bf16)
    assert all(
        type(module) is ConvolutionLinear for module in prepared.modules() if isinstance(module, torch.nn.Linear)
    )
    assert prepared.state_dict().keys() == trained.state_dict().keys()
    assert prepared.config._attn_implementation == implementation
    many = images(90)  # above `MIN_ROWS_FOR_CONVOLUTION`
    with torch.no_grad():
        torch.testing.assert_close(prepared(many).logits, trained(many).logits, rtol=1e-4, atol=1e-6)


def test_model_for_another_device_is_not_prepared(trained):
    prepare_for_cpu(trained, torch.device("cuda"), bf16=True)
    assert type(trained.classifier) is torch.nn.Linear and trained.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("bias", [True, False])
def test_many_tokens_give_the_same_products_and_gradients(bias, monkeypatch):
    torch.manual_seed(0)
    layer, tokens, weight = ConvolutionLinear(24, 40, bias), torch.randn(3, 7, 48)[..., ::2], torch.randn(3, 7, 40)
    results = []
    for least in (22, 21):  # product, convolution
        monkeypatch.setattr("modeling_lvvit.deployment.MIN_ROWS_FOR_CONVOLUTION", least)
        inputs = tokens.clone().requires_grad_()
        layer.zero_grad()
        output = layer(inputs)
        (output * weight).sum().backward()
        results.append([output, inputs.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    torch.testing.assert_close(*results)
