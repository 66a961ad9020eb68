"""timm's published weights and those of the Hugging Face Hub, by timm's own loader and cache."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_session
from timm.models import load_model_config_from_hf

from fap.class_maps import imagenet
from fap.nets.weights.about import About, Weights, from_timm
from fap.nets.weights.files import about_hub_config
from fap.nets.weights.names import TIMM, current_name, near, spelt
from pipelines.files import one_line, readable, shown
from pipelines.sizes import Size, sides_of

TIMMS_OWN = "timm/"  # repositories of the Hub
DATA_SET = re.compile(r"(?:^|_)(in\d+k)(?=_|$)")  # in a tag
REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}(@[\w./-]{1,100})?")


def published(asked: str, model_name: str | None, size: Size | None) -> Weights:
    """What `timm:asked` names: MODEL.TAG, a model's default weights, or a tag of `model_name`.

    They are resampled to images of `size` where the model is made for one size. Raises ValueError
    for a name without meaning, and for weights that are neither in the cache nor to be fetched.
    """
    full = _full_name(asked, model_name)
    architecture = full.partition(".")[0]
    cfg = timm.get_pretrained_cfg(full)
    assert cfg is not None
    about, notes = from_timm(cfg.to_dict(), TIMM + architecture)
    about = with_imagenets_names(about, full.partition(".")[2])
    if full != asked:
        notes = [f"these are {full}", *notes]
    found = cfg.test_input_size
    if found is not None and found != cfg.input_size:
        notes.append(f"its authors evaluate at {found[-1]} px (data.size={found[-1]} is up to you)")
    url = cfg.url if isinstance(cfg.url, str) or cfg.url is None else cfg.url[0]
    model = _created(full, cfg.to_dict(), cfg.hf_hub_id, url, size)
    return Weights(f"timm:{asked}", model.state_dict(), about, tuple(notes))


def of_hub(asked: str, size: Size | None) -> Weights:
    """What `hf-hub:asked` names: a repository of a timm model. Raises ValueError as `published`."""
    if not REPOSITORY.fullmatch(asked):
        raise ValueError("write hf-hub:USER/REPOSITORY, perhaps with @REVISION")
    with _hub() as no_network:
        try:
            cfg, architecture, arguments = load_model_config_from_hf(asked)
        except Exception as error:  # of the network, of the disk, of a config.json that is none
            problem = _not_in_the_hub(asked, "config.json", error, no_network)
            raise ValueError(problem) from None
    found = {"architecture": architecture, "pretrained_cfg": cfg, "model_args": arguments}
    about, notes = about_hub_config(found)
    if not timm.is_model(architecture):
        raise ValueError(f"its model is {shown(architecture)}, which timm does not have")
    if asked.startswith(TIMMS_OWN):  # others may keep a tag in what they trained on other classes
        about = with_imagenets_names(about, str(cfg.get("tag") or ""))
    model = _created(f"hf-hub:{asked}", cfg, asked, None, size)
    return Weights(f"hf-hub:{asked}", model.state_dict(), about, tuple(notes))


def with_imagenets_names(about: About, tag: str) -> About:
    """With ImageNet's WNIDs, where the tag says that the outputs are its 1,000 classes.

    in21k_ft_in1k is: the last data set of a tag is what the head was trained on.
    """
    data_sets = DATA_SET.findall(tag)
    if about.classes is None and data_sets[-1:] == ["in1k"] and about.num_classes == 1000:
        return replace(about, classes=imagenet())
    return about


def _full_name(asked: str, model_name: str | None) -> str:
    """MODEL.TAG. Raises ValueError for what timm has no weights of."""
    name = current_name(asked.removeprefix(TIMM))
    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        ours = spelt(model_name or "").removeprefix(TIMM).partition(".")[0]
        if dot or not timm.is_model(ours):
            raise ValueError(
                f"timm has no model {shown(architecture)}{near(architecture, timm.list_models())}; "
                "write timm:MODEL.TAG, timm:MODEL, or timm:TAG with model.name = timm/MODEL"
            )
        architecture, dot, tag = ours, ".", asked
    known = [one.partition(".")[2] for one in timm.list_pretrained(f"{architecture}.*")]
    if not known:
        raise ValueError(f"timm has no weights of {architecture}")
    if not dot:
        cfg = timm.get_pretrained_cfg(architecture)
        tag = (cfg.tag if cfg is not None else None) or known[0]
    if tag not in known:
        raise ValueError(
            f"{architecture} has no weights {shown(tag)}; there are {', '.join(known)}"
        )
    return f"{architecture}.{tag}"


def _created(
    name: str, cfg: Mapping[str, Any], repository: str | None, url: str | None, size: Size | None
) -> torch.nn.Module:
    """timm's model with its weights: adapted to its present names, and to `size`."""
    options: dict[str, Any] = {}
    if size is not None and cfg.get("fixed_input_size"):
        options["img_size"] = sides_of(size)
    with _hub() as no_network:
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")  # of storages that are untyped now
                return timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # of the network, of the disk, of a garbled file, of its size
            problem = _not_fetched(url or "", error)
            if repository is not None:
                problem = _not_in_the_hub(repository, "the weights", error, no_network)
            raise ValueError(problem) from None


@contextmanager
def _hub() -> Iterator[Exception | None]:
    """The Hub's client for the block, without a network as HF_HUB_OFFLINE: its cache alone.

    It would ask for each file six times, half a minute in all. Gives what the one question met
    that is asked here.
    """
    problem = _no_network()
    former = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = former or problem is not None
    try:
        yield problem
    finally:
        constants.HF_HUB_OFFLINE = former


def _no_network() -> Exception | None:
    """Why the Hub does not answer, by its client's own proxy, address and patience."""
    if constants.HF_HUB_OFFLINE:  # the user has said it
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # its client may be httpx or requests, each with errors of its own
        return error
    return None


def _not_in_the_hub(asked: str, what: str, error: Exception, no_network: Exception | None) -> str:
    """For a message: what was to be fetched, where it would be, and how it gets there."""
    repository, _, revision = asked.partition("@")
    folder = repo_folder_name(repo_id=repository, repo_type="model")
    cached = Path(constants.HF_HUB_CACHE) / folder
    if cached.exists() and not _is_of_the_network(error):
        return f"{what} of {repository} in {readable(cached)}: {one_line(error, 200)}"
    fetch = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    return (
        f"{what} of {repository} cannot be fetched from {constants.ENDPOINT} "
        f"({one_line(_root(no_network or error), 150)}), and {readable(cached)} does not hold "
        f"them; where there is a network:  {fetch}  and copy that folder here, or set HF_HOME to "
        "a shared one"
    )


def _origins(error: BaseException) -> list[BaseException]:
    """An error, what it came of, what that came of ..."""
    found = [error]
    while found[-1].__cause__ is not None or found[-1].__context__ is not None:
        cause = found[-1].__cause__ or found[-1].__context__
        if cause is None or cause in found:
            break
        found.append(cause)
    return found


def _is_of_the_network(error: Exception) -> bool:
    """Is it, or what it came of, about a connection, or a file that is not in the cache?"""
    return any(isinstance(one, OSError) for one in _origins(error))


def _root(error: Exception) -> Exception:
    """What it came of first, such as a refused connection."""
    return next(one for one in reversed(_origins(error)) if isinstance(one, Exception))


def _not_fetched(url: str, error: Exception) -> str:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(urlparse(url).path)
    return (
        f"{url} cannot be fetched or read ({one_line(error, 150)}), from the cache "
        f"{readable(cached)}; where there is a network:  curl -LO {url}  and copy the file there"
    )
