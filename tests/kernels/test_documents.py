"""Packed documents: what is known on the host, and how it reaches a device."""

from __future__ import annotations

import pytest
import torch

from kernels.documents import Documents
from kernels.nsa.plan import Plan
from kernels.nsa.spec import NsaSpec
from tiny_onn.norm_rope import rope_tables


def test_positions_start_anew_in_every_document_and_turn_rope_as_wide_numbers_do() -> None:
    docs = Documents([3, 1, 4])
    assert docs.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert docs.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert (docs.positions.dtype, docs.cu_seqlens.dtype) == (torch.int32, torch.int32)
    far = Documents([131_072])
    for narrow, wide in zip(
        rope_tables(far.positions, 8), rope_tables(far.positions.long(), 8), strict=True
    ):
        assert torch.equal(narrow, wide)


def test_documents_without_a_token_are_refused() -> None:
    for lengths in ([], [3, 0], [-1]):
        with pytest.raises(ValueError, match="documents need a token at least"):
            Documents(lengths)


def test_documents_on_a_gpu_without_a_number_are_on_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    docs = Documents([3], "cuda")
    assert docs.device == torch.device("cuda:1") and docs.to("cuda") is docs


def test_what_goes_to_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(str(device))
        return x

    # This machine has no GPU: any copy there by another way would fail.
    for module in ("kernels.documents", "kernels.nsa.plan"):
        monkeypatch.setattr(f"{module}.to_device", send)
    docs = Documents([3, 40], "cuda:0")
    _ = docs.positions, docs.cu_seqlens, Plan(docs, NsaSpec(), 64)
    assert len(sent) > 10
    assert set(sent) == {"cuda:0"}


@pytest.mark.gpu
def test_documents_on_a_gpu_hold_what_they_hold_on_the_host() -> None:
    there, here = Documents([300, 7], "cuda:0"), Documents([300, 7])
    assert torch.equal(there.positions.cpu(), here.positions)
    assert torch.equal(there.cu_seqlens.cpu(), here.cu_seqlens)
