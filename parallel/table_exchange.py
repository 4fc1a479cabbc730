"""How rows reach the ranks that need them: unique ids go to their owners, rows come back.

Rows are dealt by id modulo the world size; the owner keeps id at local index id // world. A batch's
unique ids are grouped by owner, and its rows keep that order, so that neither rows nor gradients
are permuted on the way. Rows and gradients travel on the calling thread in program order: they
share the job's process group with everything else, and ranks that issue the same calls cannot
cross. Who needs what is agreed on in a group of the table's own, over the CPU, so that any one
thread may do it, the same on all ranks.

Shapes: T tokens, U unique ids of this rank, R rows asked of this rank by all ranks (in rank order),
N distinct rows among them, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.rows import RowIndex, row_index, segment_sum, unique_index
from parallel.mesh import Mesh
from parallel.table_layout import TableError

REFUSED = -1


@dataclass(frozen=True)
class Plan:
    """Who sends which rows to whom, for one batch.

    Attributes:
        unique: U, rows that this rank receives.
        send_counts: rows that this rank asks of each owner, sum U.
        receive_counts: rows that each rank asks of this one, sum R.
        wanted_N: distinct local rows asked of this rank, sorted, int64 on the host.
        asked: which of the N each of the R asked rows is; None when they are the same (one rank).
    """

    unique: int
    send_counts: list[int]
    receive_counts: list[int]
    wanted_N: Tensor
    asked: RowIndex | None


class Exchange:
    """The collectives of one table."""

    def __init__(self, name: str, rows: int, mesh: Mesh, ids_from: str = "") -> None:
        """Exchange rows of the table `name` with ids 0 <= id < `rows`.

        Args:
            name: of the table.
            rows: V.
            mesh: rank, world and device.
            ids_from: the tokenizer that the ids come from, by name or file, for messages.
        """
        self.name, self.ids_from = name, ids_from
        self.rows = rows
        self.mesh = mesh
        self._planners = dist.new_group(backend="gloo") if mesh.world > 1 else None

    @property
    def local_rows(self) -> int:
        """Rows that this rank owns."""
        return len(range(self.mesh.rank, self.rows, self.mesh.world))

    def plan(self, ids_T: Tensor) -> tuple[Plan, RowIndex]:
        """Agree on who needs which rows. A collective call, of one thread at a time.

        Args:
            ids_T: this rank's token ids, int64 [T]; on the host, or the device is waited for.

        Returns:
            The plan, and which of the U received rows each token uses (on the mesh's device).

        Raises:
            TableError: an id outside the table, here or on another rank.
        """
        ids_T = ids_T.detach().reshape(-1).to("cpu", torch.int64)
        refusal = self._refusal(ids_T)
        world = self.mesh.world
        if refusal is not None:
            self._all_to_all_counts([REFUSED] * world)
            raise TableError(refusal)
        unique_U, index = unique_index(ids_T)
        unique = unique_U.shape[0]
        if world == 1:
            return Plan(unique, [unique], [unique], unique_U, None), self._moved(index)
        owner_U, by_owner_U = torch.sort(unique_U % world, stable=True)
        place_U = torch.empty_like(by_owner_U)
        place_U[by_owner_U] = torch.arange(unique)
        index = row_index(place_U[index.inverse_T], unique)
        send_counts = torch.bincount(owner_U, minlength=world).tolist()
        receive_counts = self._all_to_all_counts(send_counts)
        if REFUSED in receive_counts:
            raise TableError(
                f"table {self.name!r}: rank {receive_counts.index(REFUSED)} refused its batch; "
                "its own message names the id"
            )
        asked_R = torch.empty(sum(receive_counts), dtype=torch.int64)
        dist.all_to_all_single(
            asked_R,
            unique_U[by_owner_U] // world,
            receive_counts,
            send_counts,
            group=self._planners,
        )
        wanted_N, asked = unique_index(asked_R)
        return (
            Plan(
                unique,
                send_counts,
                receive_counts,
                wanted_N,
                asked.to(self.mesh.device),
            ),
            self._moved(index),
        )

    def deliver(self, plan: Plan, rows_GNw: Tensor, out_UGw: Tensor | None = None) -> Tensor:
        """Hand the wanted rows to those who asked; return this rank's. A collective call.

        Args:
            plan: of this batch, between ranks.
            rows_GNw: G parts of the rows `plan.wanted_N`, in transport type, on any device.
            out_UGw: memory for the result on the mesh's device, contiguous.

        Returns:
            [U, G, w]: one exchange moves all parts.
        """
        assert plan.asked is not None
        rows_GNw = rows_GNw.to(self.mesh.device, non_blocking=True)
        sent_RGw = rows_GNw.transpose(0, 1).index_select(0, plan.asked.inverse_T)
        if out_UGw is None:
            out_UGw = rows_GNw.new_empty(plan.unique, rows_GNw.shape[0], rows_GNw.shape[2])
        dist.all_to_all_single(out_UGw, sent_RGw, plan.send_counts, plan.receive_counts)
        return out_UGw

    def collect(self, plan: Plan, grad_UGw: Tensor) -> Tensor:
        """Bring gradients to the owners and average them over ranks. A collective call.

        Contributions to a row are added in rank order, in fp32, and divided by the world size, as
        ZeRO averages dense gradients.

        Args:
            plan: of this batch.
            grad_UGw: gradient of G parts of this rank's rows, in transport type, on the mesh's
                device.

        Returns:
            Gradients of `plan.wanted_N`, [N, G, w], on the mesh's device: fp32, or those given
            where one rank is all there is.
        """
        if plan.asked is None:
            return grad_UGw
        _, parts, width = grad_UGw.shape
        received_RX = grad_UGw.new_empty(sum(plan.receive_counts), parts * width)
        sent_UX = grad_UGw.reshape(plan.unique, parts * width).contiguous()
        dist.all_to_all_single(received_RX, sent_UX, plan.receive_counts, plan.send_counts)
        sum_NX = segment_sum(received_RX, plan.asked, dtype=torch.float32)
        return sum_NX.div_(self.mesh.world).view(-1, parts, width)

    def add_up(self, value: Tensor) -> Tensor:
        """Return the sum over ranks of fp64 0-dim values, added in rank order: alike everywhere."""
        if self.mesh.world == 1:
            return value
        values = value.new_empty(self.mesh.world, dtype=torch.float64)
        dist.all_gather_into_tensor(values, value.reshape(1).double())
        return values.sum()

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's `value` (small, picklable), in rank order. A collective call."""
        if self.mesh.world == 1:
            return [value]
        values: list[Any] = [None] * self.mesh.world
        dist.all_gather_object(values, value)
        return values

    def require(self, ids_T: Tensor) -> None:
        """Raise TableError when this rank's batch holds an id outside the table."""
        refusal = self._refusal(ids_T.detach().reshape(-1).to("cpu", torch.int64))
        if refusal is not None:
            raise TableError(refusal)

    def _moved(self, index: RowIndex) -> RowIndex:
        """Return the tokens' index where the model uses it; for a GPU its rows are cut here."""
        device = self.mesh.device
        return index.cut().to(device) if device.type == "cuda" else index.to(device)

    def _refusal(self, ids_T: Tensor) -> str | None:
        if ids_T.numel() == 0:
            return f"table {self.name!r}: the batch of rank {self.mesh.rank} has no ids"
        low, high = (int(bound) for bound in torch.aminmax(ids_T))
        if low >= 0 and high < self.rows:
            return None
        position = int(((ids_T < 0) | (ids_T >= self.rows)).nonzero()[0])
        return (
            f"table {self.name!r}: id {int(ids_T[position])} at position {position} of rank "
            f"{self.mesh.rank}'s batch is outside 0..{self.rows - 1}; the ids come from "
            f"{self.ids_from or 'an unnamed tokenizer'}, which has another vocabulary than the "
            "model: set model.vocab_size to its size, or data.path to the corpus of the model's "
            "tokenizer"
        )

    def _all_to_all_counts(self, counts: Sequence[int]) -> list[int]:
        if self.mesh.world == 1:
            return list(counts)
        received = torch.empty(self.mesh.world, dtype=torch.int64)
        sent = torch.tensor(counts, dtype=torch.int64)
        dist.all_to_all_single(received, sent, group=self._planners)
        return received.tolist()
