"""
The command `gaml-serve`: a classifier behind HTTP, see `gaml_hf.runtime.serving`.

It stands outside the package because `import gaml_hf` takes seconds: `--help` and a wrong model do not.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

from gaml_score import EXITS, _commit, _in_words_of_the_command, _is_export, _wrong_model


TOKEN_VARIABLE = "GAML_ADMIN_TOKEN"
# Seconds that a connection without a request stays open: longer than clients and proxies keep theirs (60 is usual), or
# one of them sends a request into a connection that is just being closed, and it is lost.
KEEP_ALIVE = 75
# Of `ServerSettings`, with its defaults, which stand there and, for `--help`, here; a test compares.
KNOBS = (
    (
        "slo_ms",
        float,
        None,
        "latency to keep, in ms: rows leave earlier in a burst (default: rows leave as they will)",
    ),
    ("min_exit", int, None, "layer before which no row is made to leave (default: the first exit)"),
    (
        "max_disagreement",
        float,
        None,
        "share of rows that may get another class than at full depth, at any load; needs a certificate (default: any)",
    ),
    ("max_batch_tokens", int, 4096, "tokens that run together, with padding (default: %(default)s)"),
    ("max_concurrent_requests", int, 512, "requests beyond are refused with 429 (default: %(default)s)"),
    ("timeout_ms", float, 30_000.0, "a request without an answer by then gets 504, in ms (default: %(default)g)"),
    (
        "shadow_fraction",
        float,
        0.0,
        "share of requests that run again to full depth, to compare (default: %(default)s)",
    ),
    ("max_client_batch_size", int, 32, "rows of one request (default: %(default)s)"),
    ("payload_limit", int, 2_000_000, "bytes of one request (default: %(default)s)"),
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gaml-serve",
        description="Serve a classifier over HTTP. SIGTERM or SIGINT ends it when what is in flight is answered; the "
        "exit code is then 0. It is 2 where the server could not start.",
    )
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint, or an export to ONNX: a folder, or a checkpoint's Hub name")
    add("--revision", help="of a model on the Hub: branch, tag or commit (default: the main branch as it is now)")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is all of them (default: %(default)s)")
    add("--port", type=int, default=8080, help="port to listen at; 0 is a free one (default: %(default)s)")
    add("--device", help='"cpu", "cuda:0", ... (default: a GPU where there is one)')
    add("--num_threads", type=int, help="CPU threads of the model (default: PyTorch's)")
    add("--no_prepack", action="store_true", help="leave the weights as they are on a CPU (default: reorder them)")
    strategies = "none, budgeted, patience, entropy or max_prob"
    add("--exit_strategy", help=f"when a row leaves: {strategies} (default: the model's)")
    add("--patience", type=int, help="agreeing exits, for patience (default: the model's)")
    add("--budgeted_exit", type=int, help="layer at which all leave, for budgeted (default: the model's)")
    add("--exit_threshold", type=float, help="in [0, 1], for entropy and max_prob (default: the model's)")
    for name, kind, default, text in KNOBS:
        add(f"--{name}", type=kind, default=default, help=text)
    add(
        "--admin_token",
        default=os.environ.get(TOKEN_VARIABLE),
        help=f"who shows it may change knobs by PUT /config; better in the environment variable {TOKEN_VARIABLE}, "
        "where others on the machine cannot read it (default: nobody may)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 after a drain; argparse leaves with 2 where the server could not start."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if threading.current_thread() is not threading.main_thread():  # where no signal can be caught
        return _serve(parser, options)
    # Until the server has its own: the first process of a container is not ended by a signal that it does not catch.
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _serve(parser, options)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: Any) -> None:
    os._exit(0)  # nothing is in flight; and out of an import that runs, an exception might not come


def _serve(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    is_export = _is_export(options.model)
    problem = _wrong_options(options, is_export) or _wrong_model(options.model, is_export, options.revision)
    if problem is not None:
        parser.error(problem)
    try:
        import uvicorn

        from gaml_hf.runtime.serving import LOADER, DrainingServer, ServerSettings, make_app
    except ImportError as error:
        parser.error(f"The server needs more packages: `pip install gaml_hf[serve]`. {error}")
    if (problem := _wrong_address(options.host, options.port)) is not None:
        parser.error(problem)
    import torch

    from gaml_hf.runtime.scoring import ClassifierLoader

    device = options.device or ("cuda" if torch.cuda.is_available() and not is_export else "cpu")
    prepack = device == "cpu" and not is_export and not options.no_prepack
    names = (*EXITS, *(name for name, *_ in KNOBS))
    try:
        settings = ServerSettings(**{name: getattr(options, name) for name in names})
    except ValueError as error:
        parser.error(_in_words_of_the_command(str(error), vars(options)))
    revision = _commit(options.model, options.revision)
    load = ClassifierLoader(options.model, is_export, device, options.num_threads, prepack, revision)
    app = make_app(load, settings, name=options.model, admin_token=options.admin_token and options.admin_token.strip())
    config = {"host": options.host, "port": options.port, "access_log": False, "timeout_keep_alive": KEEP_ALIVE}
    server = DrainingServer(uvicorn.Config(app, **config))
    server.run()
    if (failure := app.state.service.failure) is not None:
        parser.error(_in_words_of_the_command(str(failure), vars(options)))
    if any(thread.name == LOADER for thread in threading.enumerate()):
        # A model that still loads is left behind: under it, an interpreter that ends in the regular way aborts.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
    return 0


def _wrong_options(options: argparse.Namespace, is_export: bool) -> str | None:
    if is_export and options.device not in (None, "cpu"):
        return f"`--device` must be cpu for an export to ONNX. Got `--device {options.device}`."
    if not 0 <= options.port <= 65535:
        return f"`--port` must be between 0 and 65535. Got `--port {options.port}`."
    if options.num_threads is not None and options.num_threads < 1:
        return f"`--num_threads` must be at least 1. Got `--num_threads {options.num_threads}`."
    if (token := options.admin_token) is not None and (not token.strip() or not token.strip().isascii()):
        return "`--admin_token` must hold characters of ASCII, and more than blanks."
    return None


def _wrong_address(host: str, port: int) -> str | None:
    """Before the model is loaded, which takes a while: whether the server could listen there."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        return f"`--host` and `--port` must be where this machine can listen. Got {host} and {port}: {error}."
    return None


if __name__ == "__main__":
    sys.exit(main())
