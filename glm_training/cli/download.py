"""`glm-train download`: fetches all that a run needs from elsewhere, on a machine that has a network."""

from __future__ import annotations

from glm_training.cli.messages import hide_progress_bars, report_error
from glm_training.cli.training import EXIT_CONFIG, EXIT_FAILED
from glm_training.config import ConfigError, load_config


def download(paths: list[str], overrides: list[str], mode: str | None) -> int:
    """0 when everything is here, 2 for a configuration that cannot be used, 1 when something could not be had."""
    try:
        config = load_config(paths, overrides, mode=mode)
    except ConfigError as error:
        report_error(str(error))
        return EXIT_CONFIG
    from glm_training.engine.errors import USER_ERRORS
    from glm_training.engine.fetching import fetch_datasets, run_files
    from glm_training.rewards import RewardError
    from glm_training.utils.console import Console
    from glm_training.utils.downloads import DownloadError, in_bytes
    from glm_training.utils.hub_files import is_offline

    hide_progress_bars()
    if is_offline():
        report_error("HF_HUB_OFFLINE is set: unset it, or run this where there is a network")
        return EXIT_CONFIG
    try:
        wanted = run_files(config)
    except (*USER_ERRORS, RewardError) as error:
        report_error(str(error))
        return EXIT_CONFIG
    console, problems, rows, missing = Console(), list[str](), list[list[str]](), []
    for each in wanted:
        try:
            size = each.remaining()
        except DownloadError as error:
            problems.append(str(error))
            continue
        if size != 0:
            missing.append(each)
        told = "here" if size == 0 else "size not told" if size is None else in_bytes(size)
        rows.append([each.name, each.needed_by, told])
    if rows:
        console.table(f"what {' with '.join(paths)} needs", ["file or repository", "for", "to fetch"], rows)
    for each in missing:
        try:
            each.fetch()
        except DownloadError as error:
            problems.append(str(error))
            continue
        console.line(f"fetched {each.name}")
    problems += fetch_datasets(config, console.line)
    if problems:
        report_error("\n".join(problems))
        return EXIT_FAILED
    console.line("everything that can be fetched is here" if wanted else "nothing is needed from elsewhere")
    return 0
