"""`pd-fsm`: the command line. Each command is a thin call of the module that does the work, imported only when it is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pd_fsm import __version__
from pd_fsm.errors import PdError


def _bootstrap(args: argparse.Namespace, _: list[str]) -> int:
    from pd_fsm.runtime.bootstrap import run

    token = Path(args.token_file).read_text().strip() if args.token_file else None
    return run(args.host, args.port, args.lease_ms, token, insecure=args.insecure)


def _diagram(args: argparse.Namespace, _: list[str]) -> int:
    from pd_fsm.machines import diagram

    print(diagram.render(args.machine, args.format), end="")
    return 0


def _timeline(args: argparse.Namespace, _: list[str]) -> int:
    from pd_fsm.runtime.timeline import TraceError, timeline

    try:
        lives = timeline(args.traces, svg=args.svg, perfetto=args.perfetto)
    except (TraceError, OSError) as error:
        print(f"pd-fsm timeline: {error}", file=sys.stderr)
        return 2
    made = ", ".join(str(path) for path in (args.svg, args.perfetto) if path)
    print(
        f"read {len(lives)} session lives from {len(args.traces)} traces; wrote {made or 'nothing (ask for --svg or --perfetto)'}"
    )
    return 0


def _demo(_: argparse.Namespace, rest: list[str]) -> int:
    from pd_fsm.examples.engine import demo

    return demo.main(rest)


def _bench(_: argparse.Namespace, rest: list[str]) -> int:
    from pd_fsm.benchmarks import run

    return run.main(rest)


def _race(_: argparse.Namespace, rest: list[str]) -> int:
    from pd_fsm.testing import race

    return race.main(rest)


def _check(_: argparse.Namespace, rest: list[str]) -> int:
    from pd_fsm.testing import explore

    return explore.main(rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pd-fsm", description="The session layer of disaggregated LLM serving.")
    parser.add_argument("--version", action="version", version=f"pd-fsm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace, list[str]], int], text: str, **options: object
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, **options)  # type: ignore[arg-type]
        sub.set_defaults(run=run)
        return sub

    command("demo", _demo, "a real prefill/decode engine hands its KV cache over, and the answers are checked", add_help=False)
    command("race", _race, "look for races: simulate real sessions under faults and a virtual clock", add_help=False)
    command("bench", _bench, "measure the session layer beside what a user would use instead", add_help=False)
    command("check", _check, "explore every interleaving of small worlds of real session cores", add_help=False)

    server = command("bootstrap", _bootstrap, "the HTTP bootstrap server, where decode ranks find prefill ranks")
    server.add_argument("--host", default="127.0.0.1", help="address to bind (default %(default)s)")
    server.add_argument("--port", type=int, default=8998, help="0 takes a free one (default %(default)s)")
    server.add_argument(
        "--lease-ms", type=float, default=3_000, help="life of a registration without renewal (default %(default)s)"
    )
    server.add_argument("--token-file", help="file with the token that every request must carry")
    server.add_argument("--insecure", action="store_true", help="serve a non-loopback address without a token")

    draw = command("diagram", _diagram, "print a declared machine")
    draw.add_argument("machine", choices=("room", "lease", "peer"))
    draw.add_argument("--format", choices=("mermaid", "dot", "svg", "table"), default="mermaid")

    times = command("timeline", _timeline, "draw session traces: a picture of every room, and a Perfetto trace")
    times.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="NDJSON files written by open_session(trace=...)")
    times.add_argument("--svg", type=Path, help="write a picture")
    times.add_argument("--perfetto", type=Path, help="write a trace for ui.perfetto.dev or chrome://tracing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status; 2 for a wrong setting, with the reason on stderr."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in ("demo", "bench", "check", "race"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status: int = args.run(args, rest)
    except PdError as error:
        print(f"pd-fsm {args.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"pd-fsm {args.command}: {error}; install what it needs with: pip install 'pd-fsm[demo]'", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
