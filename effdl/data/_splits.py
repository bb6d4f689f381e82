"""What the data modules do the same: three splits, read at the first question, behind resumable loaders."""

from __future__ import annotations

from typing import Any

import lightning as L

from effdl.data.loading import EpochSampler, ResumableLoader, as_it_is


class SplitData(L.LightningDataModule):
    """Loaders over ``_datasets()``: ``train``, ``validation`` and ``test`` data sets that return collated batches.

    A subclass sets ``batch_size`` and ``seed``, reads its source in ``_read()`` and cuts it in ``_datasets()``.
    """

    batch_size: int
    seed: int

    def _read(self) -> Any:
        """The source, decoded once."""
        raise NotImplementedError

    def _datasets(self) -> dict[str, Any]:
        """The three data sets by name."""
        raise NotImplementedError

    @property
    def train_dataset(self) -> Any:
        return self._datasets()["train"]

    @property
    def val_dataset(self) -> Any:
        return self._datasets()["validation"]

    @property
    def test_dataset(self) -> Any:
        return self._datasets()["test"]

    def prepare_data(self) -> None:
        """Downloads on one process, before the others ask."""
        self._read()

    def setup(self, stage: str | None = None) -> None:
        self._datasets()

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.train_dataset, shuffle=True)

    def val_dataloader(self) -> ResumableLoader | list:
        return self._loader(self.val_dataset) if len(self.val_dataset) else []

    def test_dataloader(self) -> ResumableLoader | list:
        return self._loader(self.test_dataset) if len(self.test_dataset) else []

    def predict_dataloader(self) -> ResumableLoader | list:
        return self.test_dataloader()

    def _loader(self, dataset: Any, shuffle: bool = False) -> ResumableLoader:
        shard = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        sampler = EpochSampler(dataset, shuffle, self.seed, **shard)
        return ResumableLoader(dataset, batch_size=self.batch_size, sampler=sampler, collate_fn=as_it_is)
