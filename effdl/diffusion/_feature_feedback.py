"""DifFeed: what the decoder saw goes back to the encoder, and the features are read in a second pass.

Source: Mukhopadhyay et al., 2311.17921. Decoder block b of n feeds the encoder block n + 1 - b, whose skip it takes:
1x1 convolution without bias, batch norm, ReLU, bilinear to the encoder block's size, added to its output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from effdl.core.errors import check
from effdl.diffusion._unet_blocks import Block, number_of


class Feedback(nn.ModuleDict):
    """Features of decoder blocks to additions for encoder blocks, one small network per pair; all that is trained.

    Args:
        pairs: decoder block to encoder block, as :func:`mirrored` gives them.
        channels: of each of these blocks.

    Example::

        feedback = Feedback({8: 2}, {8: 16, 2: 32})
        added = feedback({8: torch.randn(4, 16, 8, 8)})             # {2: [4, 32, 8, 8]}
    """

    def __init__(self, pairs: Mapping[int, int], channels: Mapping[int, int]) -> None:
        super().__init__({
            str(late): nn.Sequential(
                nn.Conv2d(channels[late], channels[early], 1, bias=False), nn.BatchNorm2d(channels[early]), nn.ReLU()
            )
            for late, early in pairs.items()
        })  # fmt: skip
        self.pairs = dict(pairs)

    def forward(self, found: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Additions ``{encoder block: [B, C', h, w]}`` of features ``{decoder block: [B, C, h, w]}``."""
        return {early: self[str(late)](found[late]) for late, early in self.pairs.items()}


def mirrored(blocks: list[Block], feedback: Sequence[int | str], last: int) -> dict[int, int]:
    """Decoder block to the encoder block that it feeds.

    Args:
        blocks: of the network.
        feedback: numbers or layer names of decoder blocks.
        last: the last block that is read: what enters after it would teach nobody.

    Raises:
        ConfigurationError: a block that is none of the decoder, twice the same, or one that enters too late.
    """
    decoder = [number for number, block in enumerate(blocks, start=1) if block.kind == "output"]
    valid = f"different decoder blocks, {decoder[0]} to {decoder[-1]}" if decoder else "None: there is no decoder"
    listed = isinstance(feedback, (list, tuple)) and len(feedback) > 0
    check(listed, "feedback", feedback, valid)
    late = [number_of(blocks, block, "feedback") for block in feedback]
    check(set(late) <= set(decoder) and len(set(late)) == len(late), "feedback", feedback, valid)
    pairs = {number: len(blocks) + 1 - number for number in sorted(late)}
    fix = f"Block {last} is the last that is read."
    check(max(pairs.values()) <= last, "feedback", feedback, f"decoder blocks from {len(blocks) + 1 - last} on", fix)
    return pairs
