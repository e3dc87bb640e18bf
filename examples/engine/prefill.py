"""The prefill side: opens a room on arrival, computes prompts chunk by chunk, and hands every chunk over as soon as it is computed.

So the transfer of a chunk overlaps the computation of the next one. The scheduler never waits for a transfer and must never reuse a
page before `sender.pages_free`: pages are read from while the room is live, and after an abort for as long as a write is under way.
"""

from __future__ import annotations

import pd_fsm
from pd_fsm.examples.engine.kv_cache import PAGE_TOKENS, pages_for
from pd_fsm.examples.engine.model import chunks, greedy
from pd_fsm.examples.engine.scheduler import Request, Scheduler

COMPUTABLE = ("WAITING_FOR_INPUT", "TRANSFERRING")  # decode is known: computing for a peer that never comes would waste pages


class PrefillWorker(Scheduler):
    side = "prefill"
    holds = frozenset({"WAITING_FOR_INPUT", "TRANSFERRING"})
    _turns = 0

    def _arrived(self, request: Request) -> None:
        request.to_compute.extend(chunks(len(request.serve.prompt)))
        try:
            request.handle = self.session.send(request.room)
        except pd_fsm.LocalProtocolError as error:  # the room is already open, or the session is at its limit
            self._finish(request, "failed", str(error), cause="refused")
            return
        self._note(request, pd_fsm.Phase.BOOTSTRAPPING.name)
        needed, total = pages_for(len(request.serve.prompt)), self.cache.pages.total
        if needed > total:
            request.handle.abort(f"the prompt needs {needed} pages and {self.name} has {total}")

    def step(self) -> bool:
        for request, phase in self._poll():
            if phase is pd_fsm.Phase.SUCCESS:
                self._finish(request, "finished")
            elif phase is pd_fsm.Phase.FAILED:
                self._failed(request)
        self._reclaim()
        ready = [request for request in self.requests.values() if self._may_compute(request)]
        if not ready:
            return False
        self._turns += 1
        request = min(ready, key=lambda r: r.turn)  # round robin: a long prompt does not hold up the short ones behind it
        request.turn = self._turns
        self._compute_chunk(request)
        return True

    def _may_compute(self, request: Request) -> bool:
        if request.seen not in COMPUTABLE or not request.to_compute:
            return False
        begun = request.row is not None
        if request.held and (begun or request.serve.hold == "WAITING_FOR_INPUT"):
            return False
        # Out of memory is not an error: the request waits until others have left.
        return begun or (pages_for(len(request.serve.prompt)) <= self.cache.pages.free and self.cache.rows.free > 0)

    def _compute_chunk(self, request: Request) -> None:
        prompt, sender = request.serve.prompt, request.handle
        assert isinstance(sender, pd_fsm.Sender)
        if request.row is None:
            request.table = self.cache.pages.take(pages_for(len(prompt)))
            [request.row] = self.cache.rows.take(1)
        start, end = request.to_compute.popleft()
        logits = self.model.forward(prompt[start:end], start, self.cache, request.table)
        last = end == len(prompt)
        if last:
            token, logit = greedy(logits)
            self.cache.write_aux(request.row, request.room, len(prompt), token, logit)
        pages = request.table[start // PAGE_TOKENS : pages_for(end)]
        sender.send(pages, tokens=(start, end), last=last, aux=request.row if last else None)
