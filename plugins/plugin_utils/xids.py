"""What the driver's error codes mean, what preflight does about each, and what the user has to do.

Meanings and actions are those of NVIDIA's Xid catalogue (docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html,
as of 29 October 2025). Where its immediate action is a reset of the GPU or a restart of the machine, the node is
refused; where it is to restart the program or to ignore the code, it is warned of. tools/role_docs.py makes the table
of docs/gpu-errors.md from this file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

REFUSE, WARN = "refuse", "warn"
# The driver writes into the line of an NVLink 5 error whether that one is fatal; the catalogue has both for one code.
BY_SEVERITY = "refuse, unless the line says Nonfatal"
# The last line of a GPU counts: a step of recovery changes the action, back to None in the end.
BY_RECOVERY = "refuse while the last action of a GPU is not None"

PROGRAM = "a program's fault, most often: restart the program"
IGNORE = "nothing to do by itself"
RESET = "reset the GPU with `nvidia-smi --gpu-reset` or reboot the node, and have the GPU replaced if it comes back"
REBOOT = "reboot the node, and have the GPU replaced if it comes back"
LINK = (
    "reset the GPUs or reboot the node, and see `nvidia-smi nvlink --status`; have the board checked if it comes back"
)
NONFATAL = "do what the driver asks for (Xid 154, `nvidia-smi -q`); if it asks for nothing, restart the program"
DRAIN = "stop every program that uses NVLink (the engine too); if the driver goes on asking, reboot the node"
DRAIN_AND_RESET = "let the GPU's work end, then reset it with `nvidia-smi --gpu-reset` or reboot the node"
AS_ASKED = "do as the driver asks"
SXID_FATAL = "reboot the node, which resets all GPUs and NVSwitches; have the board checked if it comes back"
SXID_OTHER = "see the tables of SXids in NVIDIA's Fabric Manager user guide"


@dataclass(frozen=True)
class Kind:
    meaning: str
    action: str
    cure: str


UNKNOWN = Kind("unknown code", WARN, "see NVIDIA's Xid catalogue")
RECOVERY = 154
XIDS = {
    8: Kind("GPU stopped processing", WARN, PROGRAM),
    11: Kind("invalid or corrupted push buffer", WARN, PROGRAM),
    13: Kind("graphics engine exception", WARN, PROGRAM),
    31: Kind("GPU memory page fault", WARN, PROGRAM),
    32: Kind("invalid or corrupted push buffer", WARN, PROGRAM),
    43: Kind("GPU stopped processing", WARN, PROGRAM),
    45: Kind(
        "cleanup after an earlier error",
        WARN,
        "see the Xid before it; without one, a program's fault: restart the program",
    ),
    46: Kind("GPU stopped processing", REFUSE, RESET),
    48: Kind("double-bit ECC error", REFUSE, RESET),
    62: Kind("internal micro-controller halt", REFUSE, RESET),
    63: Kind("memory row remap recorded", WARN, f"{IGNORE}: preflight asks the driver if a remap is pending or failed"),
    64: Kind("memory row remap failed", REFUSE, RESET),
    69: Kind("graphics engine class error", WARN, PROGRAM),
    74: Kind("NVLink error", REFUSE, LINK),
    79: Kind("GPU has fallen off the bus", REFUSE, REBOOT),
    80: Kind("corrupted data sent to the GPU", WARN, PROGRAM),
    92: Kind("many single-bit ECC errors", WARN, f"{IGNORE}: watch the GPU, and ask NVIDIA if it goes on"),
    94: Kind("contained memory error", WARN, "restart the program that hit it"),
    95: Kind("uncontained memory error", REFUSE, RESET),
    109: Kind("context switch timeout", REFUSE, RESET),
    110: Kind("security fault", REFUSE, RESET),
    119: Kind("GSP RPC timeout", REFUSE, RESET),
    120: Kind("GSP error", REFUSE, RESET),
    136: Kind("NVLink training failed", REFUSE, LINK),
    137: Kind("NVLink privilege error", WARN, f"{IGNORE}: see the Xids beside it"),
    140: Kind("unrecovered ECC error", REFUSE, RESET),
    143: Kind("GPU initialization error", REFUSE, RESET),
    144: Kind("NVLink SAW error", BY_SEVERITY, LINK),
    145: Kind("NVLink RLW error", BY_SEVERITY, LINK),
    146: Kind("NVLink TLW error", BY_SEVERITY, LINK),
    147: Kind("NVLink TREX error", BY_SEVERITY, LINK),
    148: Kind("NVLink NVLPW_CTRL error", BY_SEVERITY, LINK),
    149: Kind("NVLink NETIR error", BY_SEVERITY, LINK),
    150: Kind("NVLink MSE error", BY_SEVERITY, LINK),
    RECOVERY: Kind("GPU recovery action changed", BY_RECOVERY, AS_ASKED),
    155: Kind("NVLink error defined by software", REFUSE, LINK),
    156: Kind("resource retired", REFUSE, RESET),
    157: Kind("resource retirement failed", WARN, f"{IGNORE}: ask NVIDIA if it comes back"),
    158: Kind("GPU fatal timeout", REFUSE, RESET),
    160: Kind("channel retired", WARN, IGNORE),
    161: Kind("channel retirement failed", WARN, f"{IGNORE}: ask NVIDIA if it comes back"),
    171: Kind("uncorrectable DRAM error", WARN, "see Xid 48 beside it"),
    172: Kind("uncorrectable SRAM error", WARN, "see Xid 48 beside it"),
}
# "This SXid can be safely ignored" (Fabric Manager user guide); it comes each time that the switch's driver is loaded.
HARMLESS_SXIDS = {22013}


@dataclass(frozen=True)
class Judged:
    """One error of the log, as it is told of."""

    label: str
    meaning: str
    place: str
    refuses: bool
    cure: str


def recovery_cure(action: str) -> str:
    """By the words that the drivers have for it: GPU Reset Required, PF FLR (from 610 on), and nvidia-smi's Reset."""
    if "P2P" in action:
        return DRAIN
    if "Drain" in action:
        return DRAIN_AND_RESET
    if "Reboot" in action:
        return REBOOT
    return RESET if "Reset" in action or "FLR" in action else AS_ASKED


def judge_xid(xid: Mapping[str, Any], fatal_codes: Collection[int]) -> Judged:
    code, action = xid["code"], xid["recovery_action"]
    kind = XIDS.get(code, UNKNOWN)
    meaning, cure, refuses = kind.meaning, kind.cure, kind.action != WARN
    if kind.action == BY_SEVERITY:
        refuses = xid["fatal"] is not False
        meaning, cure = (f"{meaning}, fatal", cure) if refuses else (f"{meaning}, not fatal", NONFATAL)
    elif kind.action == BY_RECOVERY:
        refuses = action is not None
        meaning, cure = (f"the driver asks for: {action}", recovery_cure(action)) if action else (meaning, cure)
    if fatal_codes:  # the user's own list wins
        refuses = code in fatal_codes
    return Judged(f"Xid {code}", meaning, xid["pci_address"], refuses, cure)


def judge_xids(xids: Iterable[Mapping[str, Any]], fatal_codes: Collection[int]) -> Iterator[Judged]:
    seen = list(xids)
    last = {xid["pci_address"]: xid for xid in seen if xid["code"] == RECOVERY}
    for xid in seen:
        over = xid["code"] == RECOVERY and (xid is not last[xid["pci_address"]] or xid["recovery_action"] == "None")
        if not over:
            yield judge_xid(xid, fatal_codes)


def judge_sxids(sxids: Iterable[Mapping[str, Any]]) -> Iterator[Judged]:
    for sxid in sxids:
        if sxid["fatal"] or sxid["code"] not in HARMLESS_SXIDS:
            link = "" if sxid["link"] is None else f" link {sxid['link']}"
            place = f"{sxid['switch']} ({sxid['pci_address']}){link}"
            cure = SXID_FATAL if sxid["fatal"] else SXID_OTHER
            yield Judged(f"SXid {sxid['code']}", sxid["error"], place, sxid["fatal"], cure)
