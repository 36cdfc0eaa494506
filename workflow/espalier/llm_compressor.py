"""llm-compressor made fit for a pipeline: on a loaded model, silent, on the device asked for, nothing left behind.

Its modifiers change a model's weights in place and put `weight_scale` and `weight_zero_point` beside them; `replace`
makes packed layers of these. Its own entry point is not used: it loads config and tokenizer again by the model's name,
wraps the model's `save_pretrained`, and keeps what it did in a session that the next call would find.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from espalier.errors import UserError
from espalier.models.anatomy import blocks_of
from espalier.progress import progress

if TYPE_CHECKING:
    import torch
    from llmcompressor.modifiers import Modifier
    from transformers import PreTrainedModel

    from espalier.models.lowbit import Codes, Scheme


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep llm-compressor's lines, warnings and redrawn bars out of logs; a failure prints the last of what it said."""
    said, disabled = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.WARNING)  # of torch and torchao, whose handlers hold the true stderr
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            from llmcompressor.logger import configure_logger

            configure_logger()  # else it goes on writing where the first call sent it
            yield
    except Exception:
        print(said.getvalue()[-4000:], file=sys.stderr)
        raise
    finally:
        logging.disable(disabled)


def calibrate(
    model: PreTrainedModel,
    token_ids: Sequence[Sequence[int]],
    modifiers: list[Modifier],
    batch_size: int,
    device: str,
    label: str,
) -> None:
    """Run modifiers, one after another, on a model that is on the CPU; its blocks come to the device one at a time.

    `token_ids` are samples of equal length. Afterwards the quantized layers hold `weight`, `weight_scale` and
    `weight_zero_point` (`codes` reads them, `replace` packs them). `label` goes before the progress, block by block.
    """
    import torch

    ticks, shown = iter(progress(range(len(blocks_of(model))), label)), sys.stderr
    next(ticks)

    def tick() -> None:
        with contextlib.redirect_stderr(shown):
            next(ticks, None)

    with quiet(), _on(device):
        from compressed_tensors.offload import remove_dispatch
        from llmcompressor.args import DatasetArguments
        from llmcompressor.core import create_session
        from llmcompressor.pipelines import CalibrationPipeline

        batches = [
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for ids in torch.tensor(token_ids).split(batch_size)
        ]
        with create_session() as session, _after_each_block(model, tick):
            session.initialize(model=model, start=-1, recipe=modifiers, calib_data=batches)
            CalibrationPipeline.from_modifiers(modifiers, "independent")(model, batches, DatasetArguments())
            session.finalize()
        remove_dispatch(model)
    for module in model.modules():
        vars(module).pop("forward", None)  # what stood in for the class's own, to move weights and round them


def gptq(
    model: PreTrainedModel,
    token_ids: Sequence[Sequence[int]],
    scheme: Scheme,
    damp: float,
    batch_size: int,
    device: str,
) -> None:
    """Quantize all linear layers but the head by GPTQ (Frantar et al. 2022, 2210.17323, equations 2, 3) and pack them.

    Columns are taken in the order of activation; `damp` is the share of its mean that the Hessian's diagonal is raised
    by. Activations are not rounded while Hessians are measured, whatever the scheme does with them later. All is
    computed in float32: a grid in 16 bits would be coarser than 8-bit codes. Raises UserError where a Hessian cannot be
    inverted: llm-compressor would round such a layer to nearest.
    """
    with quiet():
        from llmcompressor.modifiers.quantization import GPTQModifier

    modifier = GPTQModifier(dampening_frac=damp, **targets(model, scheme))
    failed, dtype = modifier._rtn_fallback_module_names, model.dtype
    calibrate(model.float(), token_ids, [modifier], batch_size, device, "gptq, blocks")
    if failed:
        raise UserError(
            f"GPTQ cannot invert the Hessian of {failed[0]}, one of {len(failed)} layers: raise 'damp', or take more"
            " calibration samples."
        )
    replace(model, scheme, dtype)


def targets(model: PreTrainedModel, scheme: Scheme) -> dict:
    """Return what tells a modifier to quantize the weights of all linear layers but the output head."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="channel" if scheme.group_size < 0 else "group",
        group_size=None if scheme.group_size < 0 else scheme.group_size,
    )
    head = model.get_output_embeddings()
    return {
        "config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": [name for name, module in model.named_modules() if module is head],
    }


def codes(layer: torch.nn.Linear, scheme: Scheme) -> Codes:
    """Return the codes of a layer after `calibrate`: they stand for the values that modifiers round its weights to."""
    import torch

    from espalier.models import lowbit

    scale, zero = layer.weight_scale.data.float(), layer.weight_zero_point.data
    groups = layer.weight.data.float().unflatten(1, (scale.shape[1], -1)) / scale[..., None]
    if not scheme.symmetric:
        groups += zero[..., None]  # before they are rounded, as llm-compressor does
    highest = 2 ** (scheme.bits - 1)
    found = groups.round().clamp(-highest, highest - 1).to(torch.int8).flatten(1)
    return lowbit.Codes(found, scale, None if scheme.symmetric else zero.to(torch.int8))


def replace(model: PreTrainedModel, scheme: Scheme, dtype: torch.dtype) -> None:
    """Replace quantized layers by packed ones, and turn all else, calibrated in float32, back into `dtype`."""
    from espalier.models import lowbit

    for name in list(lowbit.linear_layers(model)):  # names alone, so that each layer is freed once it is replaced
        layer = model.get_submodule(name)
        lowbit.put(model, name, lowbit.LowBitLinear.of(codes(layer, scheme), layer.bias, scheme))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def _on(device: str) -> Iterator[None]:
    """Make llm-compressor compute on this device, cpu or cuda: by itself it takes an accelerator where there is one."""
    import torch
    from compressed_tensors.utils import patch_attr
    from llmcompressor.pipelines.cache import IntermediatesCache
    from llmcompressor.pipelines.data_free import pipeline as data_free
    from llmcompressor.pipelines.sequential import pipeline as sequential

    with contextlib.ExitStack() as stack:
        if device == "cpu":
            for module in (data_free, sequential):
                stack.enter_context(patch_attr(module, "get_main_device", lambda: torch.device("cpu")))
            # Pinned memory is for copies to an accelerator, and where there is none it is an error.
            stack.enter_context(patch_attr(IntermediatesCache, "pin_memory", lambda *_: None))
        yield


@contextlib.contextmanager
def _after_each_block(model: PreTrainedModel, call: Callable[[], None]) -> Iterator[None]:
    """Have `call` called whenever modifiers are done with a part of the model that holds blocks."""
    from compressed_tensors.utils import patch_attr
    from llmcompressor.core import LifecycleCallbacks

    usual, blocks = LifecycleCallbacks.sequential_epoch_end, set(blocks_of(model))

    def ended(modules):
        usual(modules)
        if not blocks.isdisjoint(modules):
            call()

    with patch_attr(LifecycleCallbacks, "sequential_epoch_end", ended):
        yield
