"""Stock Olive's own judgement on a workflow file: exit code 1 and a last line with the reason, or silence."""

import sys
from pathlib import Path


def check(path: Path) -> None:
    """Read the file as ``olive run`` does, up to where the first pass would run. Raises what Olive raises."""
    from olive.data.component.text_generation import TextGenParams
    from olive.hardware import AcceleratorSpec
    from olive.package_config import OlivePackageConfig
    from olive.workflows.run.config import RunConfig

    config = RunConfig.parse_file_or_obj(path)
    package = OlivePackageConfig.load_default_config()
    [accelerator] = config.engine.target.config.accelerators
    machine = AcceleratorSpec(accelerator.device, accelerator.get_ep_strs()[0])
    for alternatives in config.passes.values():
        for one in alternatives:
            package.import_pass_module(one.type).generate_config(machine, one.config or {}, disable_search=True)
    for data in config.data_configs:
        TextGenParams.model_validate(data.pre_process_params)


if __name__ == "__main__":
    try:
        check(Path(sys.argv[1]))
    except Exception as error:  # noqa: BLE001 - whatever Olive raises is its answer
        print(" ".join(str(error).split()), file=sys.stderr)  # noqa: T201 - a process of its own, read by migrate
        sys.exit(1)
