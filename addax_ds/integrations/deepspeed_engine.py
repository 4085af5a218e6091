"""Puts Addax into DeepSpeed's engine, by private names of it (0.19.8)."""

from collections.abc import Callable
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from addax_ds.config.deepspeed import check_ds_config
from addax_ds.integrations.stage3 import Stage3
from addax_ds.optim.addax import Addax
from addax_ds.optim.loss_scale import UNSCALED, LossScale
from addax_ds.utils.errors import UserError


def make_zero_optimizer(
    engine: DeepSpeedEngine, optimizer: Addax, configure: Callable[[DeepSpeedEngine, Any], Any]
) -> Stage3:
    """Make the ZeRO-3 optimizer of an engine that trains with Addax.

    Args:
        engine: with its configuration.
        optimizer: made by the engine from the JSON's block, or given to it.
        configure: DeepSpeed's own method.

    Raises:
        UserError: for a configuration that Addax cannot honour.
    """
    check_ds_config(engine._config._param_dict, "the DeepSpeed configuration")
    _check_accumulation(engine)
    _take_settings(engine, optimizer)
    # The engine looks the class up in its module at each call.
    stage3.DeepSpeedZeroOptimizer_Stage3 = Stage3
    try:
        zero = configure(engine, optimizer)
    finally:
        stage3.DeepSpeedZeroOptimizer_Stage3 = DeepSpeedZeroOptimizer_Stage3
    zero.loss_scaler = LossScaler(1.0)  # the loss that `measure` returns is scaled
    zero.dynamic_loss_scale = False
    zero.sharding.engine = engine
    return zero


def _check_accumulation(engine: DeepSpeedEngine) -> None:
    steps = engine.gradient_accumulation_steps()
    if steps != 1:
        raise UserError(
            f"gradient_accumulation_steps is {steps} in the DeepSpeed configuration, and this loop "
            "calls the engine itself: write 1, and give measure() one closure for each micro-batch"
        )


def _take_settings(engine: DeepSpeedEngine, optimizer: Addax) -> None:
    """Apply settings that the JSON keeps outside the optimizer block.

    Raises:
        UserError: if it was made with another value than the JSON's.
    """
    # Not the engine's value, which is 1 where the JSON says nothing.
    clipping = engine._config._param_dict.get("gradient_clipping")
    if clipping is not None:
        if optimizer.max_grad_norm not in (0.0, clipping):
            raise UserError(
                f"Addax was made with max_grad_norm {optimizer.max_grad_norm:g}, but "
                f"gradient_clipping is {clipping:g} in the DeepSpeed configuration: give one"
            )
        optimizer.max_grad_norm = clipping
    if engine.fp16_enabled() and optimizer.loss_scale is UNSCALED:
        fp16 = engine._config.float16_config
        if fp16.loss_scale:
            optimizer.loss_scale = LossScale(fp16.loss_scale, 0, minimum=fp16.loss_scale)
        else:
            optimizer.loss_scale = LossScale(
                2.0**fp16.initial_scale_power, fp16.loss_scale_window, float(fp16.min_loss_scale)
            )
