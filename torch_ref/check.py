"""What every module of the PyTorch model makes of some tokens: one side of `convert --check`. Twin of mlx_impl's."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from mlx_impl.config import ModelConfig
from torch_ref.model import ContinualLLM, RMSNorm


def trace(config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Path of each linear layer and norm -> its output of tokens (B, T), as executed; last `logits`, (B, T, V).

    `tensors` are float32 under HF names, every one that the configuration asks for.
    """
    model = ContinualLLM(config)
    model.load_state_dict({name: torch.tensor(array) for name, array in tensors})
    outputs: dict[str, np.ndarray] = {}

    def keep(path: str) -> Callable:
        return lambda module, inputs, output: outputs.update({path: output.numpy()})

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | RMSNorm):
            module.register_forward_hook(keep(path))
    with torch.no_grad():
        outputs["logits"] = model(torch.tensor(tokens)).numpy()
    return outputs
