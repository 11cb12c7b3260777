"""An archive that rounds the far tokens of a prompt once, however many tokens follow."""

from dataclasses import dataclass, field

import torch

from vllm_leank.offline.simulate import Archive


@dataclass
class OncePerPrompt:
    """Keeps what an archive gave back of a prompt's far tokens, so that each token of an answer can
    read it. `forget` it before the next prompt.

    For archives that round granules or pages by themselves, and are asked for whole ones alone.
    """

    archive: Archive
    _far: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def forget(self) -> None:
        """Begin another prompt."""
        self._far.clear()

    def __call__(
        self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[B, H, T, D]` of all far tokens, of which `first` is the first."""
        if layer not in self._far:
            self._far[layer] = self.archive(layer, first, key, value)
        far_key, far_value = self._far[layer]
        done, tokens = far_key.shape[2], key.shape[2]
        if done < tokens:
            more = self.archive(layer, first + done, key[:, :, done:], value[:, :, done:])
            far_key, far_value = (
                torch.cat([old, new], dim=2)
                for old, new in zip((far_key, far_value), more, strict=True)
            )
            self._far[layer] = far_key, far_value
        return far_key[:, :, :tokens], far_value[:, :, :tokens]
