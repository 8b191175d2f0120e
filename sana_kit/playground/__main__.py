"""A local web page that draws with a model, base beside LoRA, and shows running and finished trainings.

    python -m sana_kit.playground --model_path ./SANA --lora_weights ./output
    python -m sana_kit.playground --model_path ./SANA --runs ./output ./older

Bound to this machine (127.0.0.1): nothing is sent anywhere. Needs `pip install starlette uvicorn`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import sys
from collections.abc import Sequence

from sana_kit.errors import Problem, UserError, run_as_script
from sana_kit.playground.config import PlaygroundConfig, parse_config

PACKAGES = ("starlette", "uvicorn")


def check_packages() -> None:
    """UserError with the command that installs what the page needs and this environment lacks."""
    if importlib.util.find_spec("torch") is None:  # another environment is active, where nothing need be added
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        remedy = f"pip install {' '.join(missing)}"
        raise UserError(Problem("", None, f"the playground needs {' and '.join(missing)}", remedy))


def listen(port: int) -> socket.socket:
    """A listening socket of this machine's own address on a port, 0 for a free one.

    Raises:
        UserError: the port is taken.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except OSError as error:
        listener.close()
        reason = f"cannot be used ({error.strerror})"
        raise UserError(Problem("port", port, reason, "Name another one; 0 takes a free one.")) from None
    return listener


def serve(config: PlaygroundConfig) -> int:
    """Check, load, and answer until Ctrl-C."""
    check_packages()
    import uvicorn

    from sana_kit.locks import lock_folder
    from sana_kit.playground.server import HOST, make_app
    from sana_kit.playground.studio import Studio

    with contextlib.ExitStack() as stack:
        studio = Studio(config.inference())
        listener = stack.enter_context(listen(config.page.port))
        stack.enter_context(lock_folder(config.page.output_path, field="output_path"))
        studio.folder.open()
        print(f"loading {config.model.model_path} on {studio.device}", flush=True)
        studio.load()
        stack.callback(studio.close)
        server = uvicorn.Server(
            uvicorn.Config(make_app(studio, config.page.runs), log_level="warning", lifespan="off")
        )
        print(f"http://{HOST}:{listener.getsockname()[1]}  (this machine only; Ctrl-C ends it)", flush=True)
        server.run(sockets=[listener])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_as_script(lambda: serve(parse_config(argv)), interrupted="ended")


if __name__ == "__main__":
    sys.exit(main())
