"""`dist-train`, or `python -m dist_train`, the form that launchers start."""

from shards.storage.stops import StopFlag


def main() -> None:
    """Heed stop signals from now on, and only then load the command line, which takes a moment."""
    StopFlag.installed()
    from dist_train import cli

    cli.main()


if __name__ == "__main__":
    main()
