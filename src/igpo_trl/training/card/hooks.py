"""When a model card is written."""

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer

from .content import make_card
from .pictures import TurnBeliefs, draw_pictures

logger = logging.getLogger(__name__)


class MakesCard(Trainer):
    """
    The part of [`IGPOTrainer`] that writes model cards, with every checkpoint; with pictures once training is over.

    A card that cannot be written is a warning and never an error.

    Attributes:
        data_sources (`dict[str, str]`): What the card says of the data besides their names and numbers, such as
            `{"Corpus": "Wikipedia of 2018"}`. Of paths only the last part is shown.
    """

    _tag_names: list[str]
    _paper: dict[str, str]
    tools: list[Any] | None

    def __init__(self, *args: Any, **kwargs: Any):
        self.data_sources: dict[str, str] = {}
        super().__init__(*args, **kwargs)
        self.turn_beliefs = TurnBeliefs(self)
        self.add_callback(self.turn_beliefs)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """As the parent's, in `output_dir`. Pictures are drawn outside of training only."""
        if not self.is_world_process_zero():
            return
        try:
            super().create_model_card(model_name, dataset_name, tags)  # for its tags and trackers' links
        except Exception as error:
            logger.warning("TRL wrote no model card: %s: %s", type(error).__name__, error)
        self._write_card(Path(str(self.args.output_dir)), model_name)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or str(self.args.output_dir))
        if not self.is_world_process_zero():
            return
        if _internal_call and not (folder / "README.md").is_file():
            return  # `create_model_card` follows; PEFT has written a card of its own where there is one
        if folder == Path(str(self.args.output_dir)) and not _internal_call:
            self.create_model_card()
        else:
            self._write_card(folder, folder.name)

    def _write_card(self, folder: Path, model_name: str | None) -> None:
        try:
            pictures = {} if self.is_in_train else draw_pictures(self, folder)
            repository = self.hub_model_id or self.args.hub_model_id or folder.absolute().name
            card = make_card(self, folder, model_name or repository.split("/")[-1], pictures)
            card.save(folder / "README.md")
        except Exception as error:  # whatever a tracker, a tool or a disk does, the model is worth more
            logger.warning("No model card was written to %s: %s: %s", folder, type(error).__name__, error)
