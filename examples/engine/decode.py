"""The decode side: reserves memory, opens a room to receive the prompt's KV cache into it, then decodes all its requests in turn.

The batch is continuous: a request joins it the moment its transfer succeeded and leaves when it is done. The scheduler must never
touch a page between `session.receive()` and Success, nor reuse one before `receiver.pages_free`: until then a prefill rank may
write to it, however long ago the request failed.
"""

from __future__ import annotations

import pd_fsm
from pd_fsm.examples.engine.kv_cache import pages_for
from pd_fsm.examples.engine.model import greedy
from pd_fsm.examples.engine.scheduler import Request, Scheduler
from pd_fsm.examples.engine.tokens import EOS


class DecodeWorker(Scheduler):
    side = "decode"
    holds = frozenset({"BOOTSTRAPPING", "SUCCESS"})

    def step(self) -> bool:
        for request, phase in self._poll():
            if phase is pd_fsm.Phase.SUCCESS:
                self._take_over(request)
            elif phase is pd_fsm.Phase.FAILED:
                self._failed(request)
        self._reclaim()
        self._admit()
        batch = [request for request in self.requests.values() if request.generated and not request.held]
        for request in batch:
            self._decode_token(request)
        return bool(batch)

    def _admit(self) -> None:
        """Open rooms for the requests that wait, oldest first, as far as there is memory for all the tokens they may need."""
        for request in [r for r in self.requests.values() if r.handle is None]:
            if request.held and request.serve.hold == "BOOTSTRAPPING":
                continue
            needed, pages = pages_for(len(request.serve.prompt) + request.serve.max_new_tokens), self.cache.pages
            if needed > pages.total:
                reason = f"prompt and new tokens need {needed} pages and {self.name} has {pages.total}"
                self._finish(request, "failed", reason, cause="refused")
            elif needed <= pages.free and self.cache.rows.free > 0:
                self._receive(request, needed)
            else:
                return

    def _receive(self, request: Request, needed: int) -> None:
        serve = request.serve
        request.table = self.cache.pages.take(needed)
        [request.row] = self.cache.rows.take(1)
        try:
            request.handle = self.session.receive(
                serve.room,
                pages=request.table[: pages_for(len(serve.prompt))],  # the rest is ours alone: for the tokens to come
                aux=request.row,
                prefill_dp_rank=serve.prefill_dp_rank,
            )
        except pd_fsm.LocalProtocolError as error:  # the room is already open, or the session is at its limit
            self._finish(request, "failed", str(error), cause="refused")
            return
        self._note(request, pd_fsm.Phase.BOOTSTRAPPING.name)

    def _take_over(self, request: Request) -> None:
        """The prompt's KV cache and the aux row are here, and nobody writes to them any more."""
        if request.abort_reason:  # it came when the room had succeeded already
            self._finish(request, "aborted", request.abort_reason, cause="abort")
            return
        assert request.row is not None
        room, prompt_tokens, token, _ = self.cache.read_aux(request.row)
        if (room, prompt_tokens) != (request.room, len(request.serve.prompt)):
            reason = f"aux row {request.row} is of room {room} with {prompt_tokens} tokens"
            self._finish(request, "failed", reason, cause="protocol")
            return
        request.generated.append(token)

    def _decode_token(self, request: Request) -> None:
        done, serve = request.generated, request.serve
        if done[-1] != EOS and len(done) < serve.max_new_tokens:
            position = len(serve.prompt) + len(done) - 1
            token, _ = greedy(self.model.forward(done[-1:], position, self.cache, request.table))
            done.append(token)
        if done[-1] == EOS or len(done) == serve.max_new_tokens:
            self._finish(request, "finished")
