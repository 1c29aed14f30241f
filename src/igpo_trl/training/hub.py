"""The model hub: whether a run may push, what is uploaded, and what a push that fails costs: nothing but the push."""

import logging
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers.trainer
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import Trainer

logger = logging.getLogger(__name__)

#: Rollouts, of training and of evaluations, which may be private or large, as patterns of `fnmatch`.
RECORDS = ("*trajectories*", "completions/*", "*verdicts.jsonl", "*/run.json", "*.html")


class PushFailed(OSError):
    """The hub did not take a model, or will not."""


def check_can_push(args: Any) -> str | None:
    """
    Make sure, if `push_to_hub` is on, that the repository exists and may be written, and return its full name.

    Only the main process asks the hub; without `push_to_hub` nobody does. The repository is made as transformers would
    make it later.

    Raises:
        PushFailed: It cannot be made, or this token may not write to it, or the hub cannot be reached.
    """
    if not args.push_to_hub or args.process_index:
        return None
    api, name, token = HfApi(), _repository(args), args.hub_token
    try:
        repository = api.create_repo(name, token=token, private=args.hub_private_repo, exist_ok=True).repo_id
    except Exception as error:
        raise PushFailed(
            f"`push_to_hub`: nothing can be pushed to {name}: {_reason(error)} Or leave out `push_to_hub`, and push "
            f"what was trained later: {how_to_push(args)}"
        ) from error
    try:
        # A repository of somebody else exists too, and takes nothing.
        api.auth_check(repository, token=token, write=True)
    except Exception as error:  # not every server answers this question
        if _status(error) in (401, 403):
            raise PushFailed(f"`push_to_hub`: nothing can be pushed to {repository}: {_reason(error)}") from error
    return str(repository)


def how_to_push(args: Any, repository: str | None = None) -> str:
    """The command that pushes the output of a run, with the files that a push of the trainer has."""
    words = ["hf", "upload", repository or _repository(args), str(args.output_dir), "."]
    words += ["--private"] if args.hub_private_repo else []
    return shlex.join(words + [word for pattern in ("checkpoint-*", *RECORDS) for word in ("--exclude", pattern)])


class PushesToHub(Trainer):
    """
    The part of [`IGPOTrainer`] that pushes to the hub.

    It uploads what transformers does, without records of rollouts (`RECORDS`). The model is saved before anything is
    uploaded. A push that fails raises [`PushFailed`], which says how to push later; in the middle of training, and in
    `save_model`, it is a warning.
    """

    hub_model_id: str | None

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        super().init_hf_repo(*args, **kwargs)
        for config in getattr(self.model, "peft_config", {}).values():
            base = config.base_model_name_or_path
            if self.is_world_process_zero() and base and Path(base).is_dir():
                logger.warning(
                    "The adapter's base model is a folder of this machine, %s, and adapter_config.json names it so: "
                    "whoever pulls the adapter has to bring that model. Push it too and train from its name on the "
                    "hub, or push the two merged.",
                    base,
                )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.hub_model_id is None:
            options = {"private": kwargs["private"]} if "private" in kwargs else {}
            try:
                self.init_hf_repo(token=token, **options)  # on the main process
            except Exception as error:
                self.save_model(_internal_call=True)
                self.create_model_card(_repository(self.args).split("/")[-1])
                raise _push_failed(self, error) from error
        with _without_records(self):
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        try:
            super().save_model(output_dir, _internal_call)
        except PushFailed as error:
            logger.warning("%s", error)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with _without_records(self):
            super()._push_from_checkpoint(checkpoint_folder)


class _Uploads:
    """The hub's client, whose uploads leave out records, and say what to do if they fail."""

    def __init__(self, api: HfApi, trainer: PushesToHub):
        self._api, self._trainer = api, trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    def upload_folder(self, run_as_future: bool = False, **options: Any) -> Any:
        options["ignore_patterns"] = [*(options.get("ignore_patterns") or ()), *RECORDS]
        if run_as_future:  # nobody looks at what it raises
            return self._api.run_as_future(self._upload, logger.warning, **options)
        return self._upload(**options)

    def _upload(self, report: Callable[..., Any] | None = None, **options: Any) -> Any:
        try:
            return self._api.upload_folder(**options)
        except Exception as error:
            failed = _push_failed(self._trainer, error)
            if report is not None:
                report("%s", failed)
            raise failed from error


@contextmanager
def _without_records(trainer: PushesToHub) -> Iterator[None]:
    module: Any = transformers.trainer
    hf_api = module.hf_api
    module.hf_api = lambda: _Uploads(hf_api(), trainer)
    try:
        yield
    finally:
        module.hf_api = hf_api


def _repository(args: Any) -> str:
    return str(args.hub_model_id or Path(args.output_dir).absolute().name)


def _push_failed(trainer: PushesToHub, error: BaseException) -> PushFailed:
    repository = trainer.hub_model_id or _repository(trainer.args)
    training = "Training continues. " if trainer.is_in_train else ""
    return PushFailed(
        f"{trainer.args.output_dir} was not pushed to {repository}: {_reason(error)} {training}The model is saved in "
        f"that folder. To push it later: {how_to_push(trainer.args, repository)}"
    )


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: BaseException) -> str:
    """A sentence of what went wrong and one of what to do."""
    cause: BaseException | None = error
    while cause is not None and _status(cause) is None and not _is_of_network(cause):  # errors of threads are wrapped
        cause = cause.__cause__
    error = cause or error
    status = _status(error)
    said = " ".join(str(getattr(error, "server_message", None) or "no reason given").split())
    if status == 401:
        return "the hub does not know the token, or there is none. Log in with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return f"this token may not write there ({said}). Take one with write permission, or another `hub_model_id`."
    if status is not None:
        fault = "The fault is on its side: try again later." if status >= 500 else "See what it says."
        return f"the hub refused with status {status} ({said}). {fault}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it."
    text = " ".join(str(error).split()).rstrip(".") or "no reason given"
    if _is_of_network(error):
        return f"the hub cannot be reached ({type(error).__name__}: {text}). Check the network."
    return f"{type(error).__name__}: {text}."


def _is_of_network(error: BaseException) -> bool:
    return "TransportError" in {kind.__name__ for kind in type(error).__mro__}  # the client's, httpx or httpx2
