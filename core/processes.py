"""The processes of a run: start them, share work and weights between them, stop and end them."""

import copy
import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import huggingface_hub
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from core.errors import UserError, complain, wait_for_launcher
from core.lora import whole_weights
from core.options import StageOptions


def launch(main: Callable[[], int | None]) -> None:
    """Run a stage and end its process. `main` returns the exit code, or None for 0.

    A UserError becomes one line and exit code 1. Every other exception keeps its traceback.
    """
    try:
        code = main() or 0
    except SystemExit as done:
        code = done.code or 0
    except UserError as error:
        complain(f"{Path(sys.argv[0]).name}: error: {error}")
        code = 1
    except KeyboardInterrupt:
        complain("interrupted")
        code = 128 + signal.SIGINT
    except (torch.OutOfMemoryError, MemoryError) as error:
        error.add_note(
            "Out of memory: lower --prompts_per_forward (sft.py: --rows_per_forward, "
            "eval_cvbench.py: --batch_size) or --max_completion_length. In training, add "
            "--gradient_checkpointing or --lora_rank 16."
        )
        raise
    except RuntimeError as error:
        if "Connection closed by peer" in str(error):  # another rank failed, and says why
            wait_for_launcher(30)
        raise
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # The process group must not be destroyed while DDP's reducer lives: the reducer's
        # destructor then waits for a thread that waits for Python, and a finished run hangs.
        gc.collect()  # `main` has returned, so the wrapped policy goes now
        if code == 0:
            PartialState().destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without the interpreter's own clean-up, which can hang too
    sys.exit(code)


def start_accelerator(options: StageOptions) -> Accelerator:
    """Accelerate with bf16 over fp32 weights on GPUs, fp32 on CPUs, or what `--precision` says.

    (`accelerate launch` always passes a precision, "no" by default, so that one is ignored.)
    Raises UserError if the launcher started more processes than accelerate sees, or if the tracker
    is not installed.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # the hub's too …
    huggingface_hub.utils.enable_progress_bars()  # … whose downloads should show
    warnings.filterwarnings("ignore", category=FutureWarning)
    # accelerate would divide every loss by it
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    # A Mac's GPU is not used: it has no float64, in which tokens are drawn.
    gpu = torch.accelerator.is_available() and not torch.backends.mps.is_available()
    bf16 = options.precision == "bf16" or (options.precision == "auto" and gpu)
    log_with = getattr(options, "log_with", None)
    installed = ["all", *map(str, get_available_trackers())]
    if log_with and log_with not in installed:  # accelerate would leave it out without a message
        raise UserError(f"--log_with {log_with} is not installed. Valid: {', '.join(installed)}")
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        cpu=not gpu,
        log_with=log_with,
        project_dir=options.output_dir,
        # rank 0 may write 27 GB while the others wait
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if not gpu:
        set_up_cpu(accelerator)
    if accelerator.is_fsdp2 and bf16:
        # No output_dtype: it would hold between the layers too. The policy returns float32.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched but accelerate runs {accelerator.num_processes}. "
            "See docs/scaling.md for the launch lines that work."
        )
    return accelerator


def set_up_cpu(accelerator: Accelerator) -> None:
    """Use all cores, and shard on a CPU as on a GPU, which is how sharding is tested."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and torch.get_num_threads() == 1:  # the launcher's default, not a choice
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        can_ask = hasattr(os, "sched_getaffinity")  # on Linux only
        cores = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count()
        torch.set_num_threads(max(1, cores // local_processes))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards on GPUs only and forgets the type in `prepare` unless both hold it
        accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)


def share_of(options: StageOptions, name: str, accelerator: Accelerator) -> range:
    """This process's places among the prompts or rows that the option counts."""
    count, processes = getattr(options, name), accelerator.num_processes
    share, rest = divmod(count, processes)
    if rest:
        raise UserError(f"--{name} {count} must be a multiple of the {processes} processes")
    return range(share * accelerator.process_index, share * (accelerator.process_index + 1))


class StopSignal:
    """Notes the first SIGINT or SIGTERM. A second SIGINT ends the process at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.number = accelerator, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number: int, _frame) -> None:
        if self.number and number == signal.SIGINT:
            os._exit(128 + number)
        self.number = number
        if self.accelerator.is_main_process:  # not print, which the signal may have interrupted
            os.write(2, b"\nfinishing this update, then saving; Ctrl-C again stops at once\n")

    def received(self) -> int:
        """The exit code, on every process, as soon as one of them was asked to stop, else 0."""
        code = torch.tensor([self.number and 128 + self.number], device=self.accelerator.device)
        return int(self.accelerator.gather(code).max())


class Replica:
    """The policy to sample from: `.model` is whole, and in compute precision.

    It is the trained model itself where that is both. Under sharding, with bf16 over fp32 weights,
    or with LoRA, it is a copy that is refreshed after every update, so that every process decodes
    at its own pace. Make it before the model gets adapters and is wrapped.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, *, lora: bool = False):
        self.model = model
        half = accelerator.mixed_precision == "bf16"
        self.is_copy = half or lora or accelerator.is_fsdp2
        if self.is_copy:
            # deepcopy takes these instead of copying the parameters in full precision
            memo = {}
            for parameter in model.parameters():
                dtype = torch.bfloat16 if half else parameter.dtype
                data = parameter.detach().to(accelerator.device, dtype, copy=True)
                memo[id(parameter)] = nn.Parameter(data, requires_grad=False)
            self.model = copy.deepcopy(model, memo).eval().to(accelerator.device)

    @torch.no_grad()
    def refresh(self, policy: nn.Module) -> None:
        """Copy the wrapped policy's weights. Every process must call it."""
        if self.is_copy:
            ours = dict(self.model.named_parameters())
            for name, weight in whole_weights(policy):
                ours[name].copy_(weight)
