"""The environment of a worker as torchrun makes it, so that scripts find what they know."""

from __future__ import annotations

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.runtime.launch_config import LaunchConfig


def torchrun_environment(config: LaunchConfig, rank: Rank, store: tuple[str, int], attempt: int) -> dict[str, str]:
    """What a script finds in its environment under torchrun, too (torch.distributed.elastic, agent api). A script that
    does not ask for recovery meets in the launcher's store, by the same variables."""
    local_rank = rank % config.nproc_per_node
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        # That of the seat: a spare node takes the place of another one.
        "GROUP_RANK": str(rank // config.nproc_per_node),
        "ROLE_RANK": str(rank),
        "WORLD_SIZE": str(config.world_size),
        "LOCAL_WORLD_SIZE": str(config.nproc_per_node),
        "GROUP_WORLD_SIZE": str(config.nnodes),
        "ROLE_WORLD_SIZE": str(config.world_size),
        "MASTER_ADDR": store[0],
        "MASTER_PORT": str(store[1]),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_MAX_RESTARTS": str(config.max_restarts),
        "TORCHELASTIC_RUN_ID": config.rdzv_id,
    }
