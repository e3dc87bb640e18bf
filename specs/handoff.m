-- The hand-off of one room between one prefill rank and one decode rank, from the end of their handshake on.
--
-- What it is for and how to run it: specs/README.md. It describes what pd_fsm/core does, and is held to it by specs/check.py: the
-- same states, the same rows for the same steps, and recorded runs of the code are runs of this model.
--
--   here                     in the code
--   p[n]                     ledger.Room number n of a prefill session, with its only ledger.Link (linked, gen and what follows them)
--   d[g]                     ledger.Room of generation g of a decode session, with its only ledger.Link
--   phase, lease             Room.state, Room.lease.state; Gone: the session has forgotten the room (or never opened it)
--   write[c]                 the Op of chunk c: it is in Link.ops, and in Lease.holders of the room
--   spent, parked, p_refuses Peer.spent, Registry._early_rooms, a Registry.Tombstone with a failure that a reader has yet to learn
--   net_*                    frames under way, by the generation that they carry; a set: no order, and no frame twice
--   offering                 Timers.repeats has the Offer. All other repetitions follow from the rest, see P.repeat_* and D.repeat_abort
--
-- A rule is one step of one session. Its name says which side, what happened and, after ">", which rows of the machines the step
-- takes, in order, by their ids in pd_fsm/machines. `net.*` and `env.*` are the network's and the data plane's.
--
-- Left out: reasons and byte counts (no rule asks for them), time (any timer that is armed may fire), and what is in neither room:
-- other rooms, other peers, the handshake, heartbeats.

const
  GENS: 1;        -- lives of the room at decode: each is a generation, and names a transfer on the wire
  LIVES: 1;       -- lives of the room at prefill
  CHUNKS: 1;      -- chunks that the engine hands in for one life
  ANY_LAST: 0;    -- 1: it may hand in fewer, any chunk can be the last one
  P_ABORTS: 1;    -- how often prefill's engine may give a room up
  D_ABORTS: 1;    -- how often decode's engine may
  FAILS: 0;       -- writes that may fail
  DOUBTS: 0;      -- writes of which nobody knows how they ended, until that is proven
  P_DEATHS: 0;    -- how often prefill's process may die; it stays dead: its successor is another process, with links of its own
  D_DEATHS: 0;    -- how often decode's may
  SILENCES: 0;    -- 1: prefill may give decode up, at any time: nothing is owed to it any more
  LOSSES: 0;      -- frames that may be lost
  DUPLICATES: 0;  -- frames that may arrive twice
  DEADLINES: 2;   -- the deadline of a live room may run out: 0 never, 1 when all is quiet, 2 at any time
  EXPIRY: 0;      -- 1: tombstones and early offers may lapse at any time
  VOUCHES: 0;     -- decode's data plane vouches that nothing can land any more: 0 never, 1 as a grant is revoked, 2 some time after
  NOTIFIES: 0;    -- the data plane tells decode that a chunk is placed: 0 never, 1 as the write ends, 2 before it ends, or not
  LOOKUPS: 0;     -- 1: decode may have to look its writer up and to greet it first

type
  Gen: 1..GENS;
  MaybeGen: 0..GENS;
  Life: 1..LIVES;
  Chunk: 0..CHUNKS - 1;
  Phase: enum { Gone, Bootstrapping, Waiting, Transferring, Success, Failed };
  Lease: enum { Private, Exposed, Revoking, Quiesced, Quarantined };
  Write: enum { None, Busy, Placed, Doubtful };  -- Placed: decode was told, the writer does not know yet

  Sending: record
    phase: Phase;
    open: boolean;    -- not cleared
    lease: Lease;     -- of the source pages; its holders are the writes
    chunks: 0..CHUNKS;  -- handed in
    closed: boolean;  -- the last one was
    unmet: boolean;   -- no reader has offered: if this life fails, the next one that offers does not know it
    linked: boolean;  -- a reader is bound, and something may still be owed to it
    gen: MaybeGen;    -- which generation of decode's
    write: array [Chunk] of Write;
    confirmed: array [Chunk] of boolean;
    told: boolean;    -- the data plane itself told decode of every part
    verdict_acked: boolean;
    drain_asked: boolean;
  end;

  Receiving: record
    phase: Phase;
    open: boolean;    -- not cleared
    lease: Lease;     -- of the destination pages; its only holder is the writer
    linked: boolean;  -- the writer is bound, and may still owe something
    offering: boolean;
    confirmed: array [Chunk] of boolean;
    total: 0..CHUNKS;  -- 0 until the last chunk is known
  end;

var
  p: array [Life] of Sending;
  p_opened: 0..LIVES;
  p_refuses: boolean;
  parked: array [Gen] of MaybeGen;  -- offers that came before the room was opened, the first one first; 0: none
  spent: array [Gen] of boolean;    -- transfers that concluded at prefill: no offer of theirs can open anything again

  d: array [Gen] of Receiving;
  d_opened: 0..GENS;

  -- to prefill
  net_offer, net_abort, net_verdict_ack, net_drained_ack: array [Gen] of boolean;
  -- to decode. Verdicts: net_success and net_failure, whose index says whether bytes had moved: those are different frames
  net_accepted, net_success, net_drained: array [Gen] of boolean;
  net_failure: array [Gen] of array [boolean] of boolean;
  net_part: array [Gen] of array [Chunk] of array [boolean] of boolean;  -- the last index: it says that it is the last one

  p_dead: boolean;
  d_dead: boolean;

  landed: array [Gen] of array [Chunk] of boolean;  -- nobody's knowledge, the truth: these bytes are in pages of a live room

  p_aborts: 0..P_ABORTS;
  d_aborts: 0..D_ABORTS;
  fails: 0..FAILS;
  doubts: 0..DOUBTS;
  losses: 0..LOSSES;
  duplicates: 0..DUPLICATES;

-- facts ----------------------------------------------------------------------------------------------------------------------

function live(phase: Phase): boolean;
begin
  return phase = Bootstrapping | phase = Waiting | phase = Transferring;
end;

function concluded(phase: Phase): boolean;
begin
  return phase = Success | phase = Failed;
end;

function writing(n: Life): boolean;
begin
  return exists c: Chunk do p[n].write[c] != None end;
end;

function last_write(n: Life; c: Chunk): boolean;
begin
  return p[n].write[c] != None & forall other: Chunk do other != c -> p[n].write[other] = None end;
end;

function moved(n: Life): boolean;
begin
  return exists c: Chunk do p[n].confirmed[c] end;
end;

function is_last(n: Life; c: Chunk): boolean;
begin
  return p[n].closed & c + 1 = p[n].chunks;
end;

-- Whether every chunk is confirmed once c is.
function confirms_all(n: Life; c: Chunk): boolean;
begin
  return p[n].closed & forall other: Chunk do other < p[n].chunks & other != c -> p[n].confirmed[other] end;
end;

function completes(g: Gen; c: Chunk; last: boolean): boolean;
begin
  return (last | d[g].total > 0) &
    forall other: Chunk do other < (last ? c + 1 : d[g].total) & other != c -> d[g].confirmed[other] end;
end;

function p_is_open(): boolean;
begin
  return exists n: Life do p[n].open end;
end;

function d_is_open(): boolean;
begin
  return exists g: Gen do d[g].open end;
end;

function bound(n: Life; g: Gen): boolean;
begin
  return p[n].linked & p[n].gen = g;
end;

function is_bound(g: Gen): boolean;
begin
  return exists n: Life do bound(n, g) end;
end;

function is_parked(g: Gen): boolean;
begin
  return exists i: Gen do parked[i] = g end;
end;

-- Whether an offer of g opens the transfer.
function binds(g: Gen): boolean;
begin
  return !is_bound(g) & !spent[g] & exists n: Life do p[n].open & p[n].phase = Bootstrapping end;
end;

function is_news(g: Gen; c: Chunk): boolean;
begin
  return live(d[g].phase) & !d[g].confirmed[c];
end;

function awaits_drained(g: Gen): boolean;
begin
  return d[g].linked & (d[g].lease = Revoking | d[g].lease = Quarantined);
end;

-- what may happen --------------------------------------------------------------------------------------------------------------

-- A frame is taken away when it is delivered, unless it arrives `again` later.
function may(again: boolean): boolean;
begin
  return again -> duplicates > 0;
end;

-- Notices of a data plane are neither lost nor repeated.
function may_notice(again: boolean): boolean;
begin
  return again -> NOTIFIES = 0 & duplicates > 0;
end;

function may_hand_in(n: Life; last: boolean): boolean;
begin
  return p[n].open & live(p[n].phase) & !p[n].closed & p[n].chunks < CHUNKS &
    (ANY_LAST = 1 | last = (p[n].chunks + 1 = CHUNKS));
end;

-- A data plane that vouches lets nothing land in a grant that was revoked, and none writes to a process that is dead: `in_vain` the
-- write fails then, and no fault is needed for it.
function may_be_done(n: Life; c: Chunk): boolean;
begin
  return p[n].write[c] = Placed | (p[n].write[c] = Busy & !d_dead & (VOUCHES != 1 | live(d[p[n].gen].phase)));
end;

function may_be_failed(n: Life; c: Chunk; in_vain: boolean): boolean;
begin
  return p[n].write[c] = Busy & (in_vain ? d_dead | (VOUCHES = 1 & !live(d[p[n].gen].phase)) : fails > 0);
end;

function may_be_unknown(n: Life; c: Chunk): boolean;
begin
  return doubts > 0 & (p[n].write[c] = Busy | p[n].write[c] = Placed);
end;

-- Nothing is under way, and nobody will open the room any more: deadlines are far longer than ways.
function quiet(): boolean;
begin
  return (p_dead | p_is_open() | p_opened = LIVES) & (d_dead | d_is_open() | d_opened = GENS) &
    !exists n: Life do writing(n) end &
    !exists g: Gen do
      !p_dead & (net_offer[g] | net_abort[g] | net_verdict_ack[g] | net_drained_ack[g]) |
      !d_dead & (net_accepted[g] | net_success[g] | net_drained[g] | net_failure[g][false] | net_failure[g][true] |
        exists c: Chunk do net_part[g][c][false] | net_part[g][c][true] end)
    end;
end;

function timely(): boolean;
begin
  return DEADLINES = 2 | (DEADLINES = 1 & quiet());
end;

procedure take(var frame: boolean; again: boolean);
begin
  if again then
    duplicates := duplicates - 1;
  else
    frame := false;
  end;
end;

procedure charge_failure(in_vain: boolean);
begin
  if !in_vain then
    fails := fails - 1;
  end;
end;

-- what prefill does (pd_fsm/core/sender.py) -----------------------------------------------------------------------------------

-- A room that was cleared, and to which nobody is linked, is forgotten.
procedure p_forget(n: Life);
begin
  if !p[n].open & !p[n].linked then
    p[n].phase := Gone;
    p[n].lease := Private;
    p[n].unmet := false;
  end;
end;

procedure unlink(n: Life);
begin
  spent[p[n].gen] := true;
  p[n].linked := false;
  p[n].gen := 0;
  p[n].chunks := 0;
  p[n].closed := false;
  p[n].told := false;
  p[n].verdict_acked := false;
  p[n].drain_asked := false;
  for c: Chunk do
    p[n].confirmed[c] := false;
  end;
  p_forget(n);
end;

procedure unpark(g: Gen);
var found: boolean;
begin
  found := false;
  for i: Gen do
    if parked[i] = g then
      found := true;
    end;
    if found then
      parked[i] := i < GENS ? parked[i + 1] : 0;
    end;
  end;
end;

procedure park(g: Gen);
var done: boolean;
begin
  done := is_parked(g);
  for i: Gen do
    if !done & parked[i] = 0 then
      parked[i] := g;
      done := true;
    end;
  end;
end;

procedure refuse(g: Gen);
begin
  unpark(g);
  spent[g] := true;
  net_failure[g][false] := true;
end;

procedure tell(n: Life);
begin
  if p[n].phase = Success then
    net_success[p[n].gen] := true;
  else
    net_failure[p[n].gen][moved(n)] := true;
  end;
end;

-- Send the Drained that is due, and forget a link to which nothing is owed any more. `due`: it has not been sent before.
procedure quiesce(n: Life; due: boolean);
begin
  if p[n].linked & !writing(n) then
    if p[n].drain_asked then
      if due then
        net_drained[p[n].gen] := true;
      end;
    elsif p[n].verdict_acked then
      unlink(n);
    end;
  end;
end;

procedure p_conclude(n: Life);
begin
  p[n].lease := writing(n) ? Revoking : Quiesced;
  if !p[n].linked then
    p[n].chunks := 0;
    p[n].closed := false;
  end;
end;

procedure p_fail(n: Life);
begin
  assert "only a live room fails" live(p[n].phase);
  p[n].phase := Failed;
  if p[n].linked & !p[n].drain_asked then
    tell(n);
  end;
  quiesce(n, true);
  p_conclude(n);
end;

procedure p_succeed(n: Life);
begin
  assert "only a transfer succeeds" p[n].phase = Transferring;
  assert "every chunk is confirmed" p[n].closed & forall c: Chunk do c < p[n].chunks -> p[n].confirmed[c] end;
  p[n].phase := Success;
  p_conclude(n);
  if p[n].told then
    unlink(n);
  else
    tell(n);
  end;
end;

procedure p_doubt(n: Life);
begin
  assert "only memory that is being taken back is in doubt" p[n].lease = Revoking;
  p[n].lease := Quarantined;
end;

-- The write of c is over, and so is its room.
procedure ended(n: Life; c: Chunk);
begin
  p[n].write[c] := None;
  if !writing(n) then
    p[n].lease := Quiesced;
  end;
  quiesce(n, true);
end;

procedure pump(n: Life);
begin
  for c: Chunk do
    if c < p[n].chunks & p[n].write[c] = None & !p[n].confirmed[c] then
      p[n].write[c] := Busy;
      p[n].phase := Transferring;
      p[n].lease := Exposed;
    end;
  end;
end;

procedure bind(n: Life; g: Gen);
begin
  assert "a transfer begins once" !spent[g] & !is_bound(g);
  assert "a room has one reader" p[n].phase = Bootstrapping & !p[n].linked;
  p[n].phase := Waiting;
  p[n].linked := true;
  p[n].gen := g;
  p[n].unmet := false;
  p[n].told := true;
  pump(n);
  if !writing(n) then
    net_accepted[g] := true;
  end;
end;

procedure p_open();
begin
  p_opened := p_opened + 1;
  p[p_opened].open := true;
  p[p_opened].phase := Bootstrapping;
  p[p_opened].unmet := true;
  p_refuses := false;
  if parked[1] != 0 then
    bind(p_opened, parked[1]);
    unpark(parked[1]);
    for i: Gen do
      if parked[1] != 0 then
        refuse(parked[1]);
      end;
    end;
  end;
end;

procedure hand_in(n: Life; last: boolean);
begin
  p[n].chunks := p[n].chunks + 1;
  p[n].closed := last;
  if p[n].phase != Bootstrapping then
    pump(n);
  end;
end;

-- The bytes of c are in their place.
procedure place(n: Life; c: Chunk);
begin
  landed[p[n].gen][c] := live(d[p[n].gen].phase);
end;

-- The write of c ended well: so the data plane says, and tells decode if it can.
procedure placed(n: Life; c: Chunk);
begin
  if p[n].write[c] = Busy then
    place(n, c);
    if NOTIFIES = 1 then
      net_part[p[n].gen][c][is_last(n, c)] := true;
    end;
  end;
end;

procedure confirm(n: Life; c: Chunk);
begin
  assert "only a transfer makes progress" p[n].phase = Transferring;
  assert "a chunk is written once" !p[n].confirmed[c];
  if NOTIFIES = 0 | (NOTIFIES = 2 & p[n].write[c] = Busy) then
    p[n].told := false;
    net_part[p[n].gen][c][is_last(n, c)] := true;
  end;
  p[n].write[c] := None;
  p[n].confirmed[c] := true;
end;

-- what decode does (pd_fsm/core/receiver.py) ----------------------------------------------------------------------------------

procedure d_forget(g: Gen);
begin
  if !d[g].open & !d[g].linked then
    d[g].phase := Gone;
    d[g].lease := Private;
  end;
end;

procedure d_unlink(g: Gen);
begin
  d[g].linked := false;
  d_forget(g);
end;

procedure d_conclude(g: Gen);
begin
  d[g].offering := false;
  d[g].total := 0;
  for c: Chunk do
    d[g].confirmed[c] := false;
    landed[g][c] := false;
  end;
end;

procedure d_open();
begin
  d_opened := d_opened + 1;
  d[d_opened].open := true;
  d[d_opened].phase := Bootstrapping;
end;

procedure offer(g: Gen);
begin
  d[g].phase := Waiting;
  d[g].lease := Exposed;
  d[g].linked := true;
  d[g].offering := true;
  net_offer[g] := true;
end;

procedure d_fail(g: Gen);
begin
  assert "only a live room fails" live(d[g].phase);
  if d[g].phase = Bootstrapping then  -- it has exposed nothing, and nobody knows of it
    d[g].phase := Failed;
    d[g].lease := Quiesced;
    d_unlink(g);
  else
    d[g].phase := Failed;
    d[g].lease := VOUCHES = 1 ? Quiesced : Revoking;
    net_abort[g] := true;
  end;
  d_conclude(g);
end;

-- The writer is proven dead: nobody is left to be asked.
procedure d_mourn(g: Gen);
begin
  d[g].phase := Failed;
  d[g].lease := Quiesced;
  d_conclude(g);
  d_unlink(g);
end;

procedure d_succeed(g: Gen);
begin
  assert "only a transfer succeeds" d[g].phase = Waiting | d[g].phase = Transferring;
  assert "success is complete" ANY_LAST = 1 | forall c: Chunk do landed[g][c] end;
  d[g].phase := Success;
  d[g].lease := Quiesced;
  d_conclude(g);
  d_unlink(g);
end;

procedure part(g: Gen; c: Chunk; last: boolean);
begin
  assert "only a transfer makes progress" d[g].phase = Waiting | d[g].phase = Transferring;
  assert "a part counts once" !d[g].confirmed[c];
  d[g].phase := Transferring;
  d[g].confirmed[c] := true;
  d[g].offering := false;
  if last then
    d[g].total := c + 1;
  end;
end;

procedure drained(g: Gen);
begin
  net_drained_ack[g] := true;
  if d[g].linked then
    assert "nobody says Drained who was not asked" d[g].phase = Failed;
    d[g].lease := Quiesced;
    d_unlink(g);
  end;
end;

startstate
begin
  clear p;
  clear d;
  clear p_opened;
  clear d_opened;
  clear p_refuses;
  clear parked;
  clear spent;
  clear net_offer;
  clear net_abort;
  clear net_verdict_ack;
  clear net_drained_ack;
  clear net_accepted;
  clear net_success;
  clear net_drained;
  clear net_failure;
  clear net_part;
  clear landed;
  clear p_dead;
  clear d_dead;
  p_aborts := P_ABORTS;
  d_aborts := D_ABORTS;
  fails := FAILS;
  doubts := DOUBTS;
  losses := LOSSES;
  duplicates := DUPLICATES;
end;

-- prefill: the engine --------------------------------------------------------------------------------------------------------

rule "P.open"
  !p_dead & !p_is_open() & p_opened < LIVES & parked[1] = 0
==> begin
  p_open();
end;

rule "P.open > room.peer_ready:BOOTSTRAPPING[all_peers_known]"
  !p_dead & !p_is_open() & p_opened < LIVES & parked[1] != 0
==> begin
  p_open();
end;

ruleset n: Life; last: boolean do
  rule "P.chunk"
    may_hand_in(n, last) & p[n].phase = Bootstrapping
  ==> begin
    hand_in(n, last);
  end;

  rule "P.chunk > room.start:WAITING_FOR_INPUT + lease.expose:PRIVATE"
    may_hand_in(n, last) & p[n].phase = Waiting
  ==> begin
    hand_in(n, last);
  end;

  rule "P.chunk > lease.expose:EXPOSED"
    may_hand_in(n, last) & p[n].phase = Transferring
  ==> begin
    hand_in(n, last);
  end;
end;

ruleset n: Life do
  rule "P.abort > room.fail:BOOTSTRAPPING + lease.conclude:PRIVATE"
    p[n].open & p_aborts > 0 & p[n].phase = Bootstrapping
  ==> begin
    p_aborts := p_aborts - 1;
    p_fail(n);
  end;

  rule "P.abort > room.fail:WAITING_FOR_INPUT + lease.conclude:PRIVATE"
    p[n].open & p_aborts > 0 & p[n].phase = Waiting
  ==> begin
    p_aborts := p_aborts - 1;
    p_fail(n);
  end;

  rule "P.abort > room.fail:TRANSFERRING + lease.conclude:EXPOSED[no_holder]"
    p[n].open & p_aborts > 0 & p[n].phase = Transferring & !writing(n)
  ==> begin
    p_aborts := p_aborts - 1;
    p_fail(n);
  end;

  rule "P.abort > room.fail:TRANSFERRING + lease.conclude:EXPOSED[!no_holder]"
    p[n].open & p_aborts > 0 & p[n].phase = Transferring & writing(n)
  ==> begin
    p_aborts := p_aborts - 1;
    p_fail(n);
  end;

  rule "P.deadline > room.fail:BOOTSTRAPPING + lease.conclude:PRIVATE"
    timely() & p[n].open & p[n].phase = Bootstrapping
  ==> begin
    p_fail(n);
  end;

  rule "P.deadline > room.fail:WAITING_FOR_INPUT + lease.conclude:PRIVATE"
    timely() & p[n].open & p[n].phase = Waiting
  ==> begin
    p_fail(n);
  end;

  rule "P.deadline > room.fail:TRANSFERRING + lease.conclude:EXPOSED[no_holder]"
    timely() & p[n].open & p[n].phase = Transferring & !writing(n)
  ==> begin
    p_fail(n);
  end;

  rule "P.deadline > room.fail:TRANSFERRING + lease.conclude:EXPOSED[!no_holder]"
    timely() & p[n].open & p[n].phase = Transferring & writing(n)
  ==> begin
    p_fail(n);
  end;

  rule "P.clear"
    p[n].open & concluded(p[n].phase)
  ==> begin
    p_refuses := p[n].phase = Failed & p[n].unmet;
    p[n].unmet := false;
    p[n].open := false;
    p_forget(n);
  end;
end;

-- prefill: messages ----------------------------------------------------------------------------------------------------------

ruleset g: Gen; again: boolean do
  rule "P.offer"
    !p_dead & net_offer[g] & may(again) & !binds(g)
  ==> begin
    take(net_offer[g], again);
    if is_bound(g) then
      if exists n: Life do bound(n, g) & live(p[n].phase) end then
        net_accepted[g] := true;
      end;
    elsif spent[g] then
      refuse(g);
    elsif p_is_open() then
      for n: Life do
        if p[n].open & p[n].phase = Failed then
          p[n].unmet := false;
        end;
      end;
      refuse(g);
    elsif p_refuses then
      p_refuses := false;
      refuse(g);
    else
      park(g);
    end;
  end;
end;

ruleset n: Life; g: Gen; again: boolean do
  rule "P.offer > room.peer_ready:BOOTSTRAPPING[all_peers_known]"
    !p_dead & net_offer[g] & may(again) & binds(g) & p[n].open & p[n].chunks = 0
  ==> begin
    take(net_offer[g], again);
    bind(n, g);
  end;

  rule "P.offer > room.peer_ready:BOOTSTRAPPING[all_peers_known] + room.start:WAITING_FOR_INPUT + lease.expose:PRIVATE"
    !p_dead & net_offer[g] & may(again) & binds(g) & p[n].open & p[n].chunks = 1
  ==> begin
    take(net_offer[g], again);
    bind(n, g);
  end;

  rule "P.offer > room.peer_ready:BOOTSTRAPPING[all_peers_known] + room.start:WAITING_FOR_INPUT + lease.expose:PRIVATE + lease.expose:EXPOSED"
    !p_dead & net_offer[g] & may(again) & binds(g) & p[n].open & p[n].chunks = 2
  ==> begin
    take(net_offer[g], again);
    bind(n, g);
  end;
end;

ruleset g: Gen; again: boolean do
  rule "P.abort_message"
    !p_dead & net_abort[g] & may(again) & !is_bound(g)
  ==> begin
    take(net_abort[g], again);
    unpark(g);
    spent[g] := true;
    net_drained[g] := true;
  end;
end;

ruleset n: Life; g: Gen; again: boolean do
  rule "P.abort_message"
    !p_dead & net_abort[g] & may(again) & bound(n, g) & !live(p[n].phase)
  ==> begin
    take(net_abort[g], again);
    if !p[n].drain_asked & !writing(n) then
      net_drained[g] := true;
    end;
    p[n].drain_asked := true;
  end;

  rule "P.abort_message > room.fail:WAITING_FOR_INPUT + lease.conclude:PRIVATE"
    !p_dead & net_abort[g] & may(again) & bound(n, g) & p[n].phase = Waiting
  ==> begin
    take(net_abort[g], again);
    p[n].drain_asked := true;
    p_fail(n);
  end;

  rule "P.abort_message > room.fail:TRANSFERRING + lease.conclude:EXPOSED[no_holder]"
    !p_dead & net_abort[g] & may(again) & bound(n, g) & p[n].phase = Transferring & !writing(n)
  ==> begin
    take(net_abort[g], again);
    p[n].drain_asked := true;
    p_fail(n);
  end;

  rule "P.abort_message > room.fail:TRANSFERRING + lease.conclude:EXPOSED[!no_holder]"
    !p_dead & net_abort[g] & may(again) & bound(n, g) & p[n].phase = Transferring & writing(n)
  ==> begin
    take(net_abort[g], again);
    p[n].drain_asked := true;
    p_fail(n);
  end;
end;

ruleset g: Gen; again: boolean do
  rule "P.verdict_ack"
    !p_dead & net_verdict_ack[g] & may(again)
  ==> begin
    take(net_verdict_ack[g], again);
    for n: Life do
      if bound(n, g) & concluded(p[n].phase) then
        p[n].verdict_acked := true;
        quiesce(n, false);
      end;
    end;
  end;

  rule "P.drained_ack"
    !p_dead & net_drained_ack[g] & may(again)
  ==> begin
    take(net_drained_ack[g], again);
    for n: Life do
      if bound(n, g) & p[n].drain_asked & !writing(n) then
        unlink(n);
      end;
    end;
  end;
end;

-- prefill: writes ------------------------------------------------------------------------------------------------------------

ruleset n: Life; c: Chunk do
  rule "P.write_done > lease.settled:EXPOSED + room.part_settled:TRANSFERRING[!all_confirmed]"
    may_be_done(n, c) & live(p[n].phase) & !confirms_all(n, c)
  ==> begin
    placed(n, c);
    confirm(n, c);
  end;

  rule "P.write_done > lease.settled:EXPOSED + room.part_settled:TRANSFERRING[all_confirmed] + lease.conclude:EXPOSED[no_holder]"
    may_be_done(n, c) & live(p[n].phase) & confirms_all(n, c)
  ==> begin
    placed(n, c);
    confirm(n, c);
    p_succeed(n);
  end;

  rule "P.write_done > lease.settled:REVOKING[no_holder]"
    may_be_done(n, c) & p[n].lease = Revoking & last_write(n, c)
  ==> begin
    placed(n, c);
    ended(n, c);
  end;

  rule "P.write_done > lease.settled:REVOKING[!no_holder]"
    may_be_done(n, c) & p[n].lease = Revoking & !last_write(n, c)
  ==> begin
    placed(n, c);
    ended(n, c);
  end;

  rule "P.write_done > lease.settled:QUARANTINED[no_holder]"
    may_be_done(n, c) & p[n].lease = Quarantined & last_write(n, c)
  ==> begin
    placed(n, c);
    ended(n, c);
  end;

  rule "P.write_done > lease.settled:QUARANTINED[!no_holder]"
    may_be_done(n, c) & p[n].lease = Quarantined & !last_write(n, c)
  ==> begin
    placed(n, c);
    ended(n, c);
  end;
end;

ruleset n: Life; c: Chunk; in_vain: boolean do
  rule "P.write_failed > room.fail:TRANSFERRING + lease.conclude:EXPOSED[!no_holder] + lease.settled:REVOKING[no_holder]"
    may_be_failed(n, c, in_vain) & live(p[n].phase) & last_write(n, c)
  ==> begin
    charge_failure(in_vain);
    p[n].write[c] := None;
    p_fail(n);
  end;

  rule "P.write_failed > room.fail:TRANSFERRING + lease.conclude:EXPOSED[!no_holder] + lease.settled:REVOKING[!no_holder]"
    may_be_failed(n, c, in_vain) & live(p[n].phase) & !last_write(n, c)
  ==> begin
    charge_failure(in_vain);
    p[n].write[c] := None;
    p_fail(n);
  end;

  rule "P.write_failed > lease.settled:REVOKING[no_holder]"
    may_be_failed(n, c, in_vain) & p[n].lease = Revoking & last_write(n, c)
  ==> begin
    charge_failure(in_vain);
    ended(n, c);
  end;

  rule "P.write_failed > lease.settled:REVOKING[!no_holder]"
    may_be_failed(n, c, in_vain) & p[n].lease = Revoking & !last_write(n, c)
  ==> begin
    charge_failure(in_vain);
    ended(n, c);
  end;

  rule "P.write_failed > lease.settled:QUARANTINED[no_holder]"
    may_be_failed(n, c, in_vain) & p[n].lease = Quarantined & last_write(n, c)
  ==> begin
    charge_failure(in_vain);
    ended(n, c);
  end;

  rule "P.write_failed > lease.settled:QUARANTINED[!no_holder]"
    may_be_failed(n, c, in_vain) & p[n].lease = Quarantined & !last_write(n, c)
  ==> begin
    charge_failure(in_vain);
    ended(n, c);
  end;
end;

ruleset n: Life; c: Chunk do
  rule "P.write_unknown > room.fail:TRANSFERRING + lease.conclude:EXPOSED[!no_holder] + lease.unknown:REVOKING"
    may_be_unknown(n, c) & live(p[n].phase)
  ==> begin
    doubts := doubts - 1;
    p[n].write[c] := Doubtful;
    p_fail(n);
    p_doubt(n);
  end;

  rule "P.write_unknown > lease.unknown:REVOKING"
    may_be_unknown(n, c) & p[n].lease = Revoking
  ==> begin
    doubts := doubts - 1;
    p[n].write[c] := Doubtful;
    p_doubt(n);
  end;

  rule "P.write_unknown"
    may_be_unknown(n, c) & p[n].lease = Quarantined
  ==> begin
    doubts := doubts - 1;
    p[n].write[c] := Doubtful;
  end;

  rule "P.write_settled > lease.settled:QUARANTINED[no_holder]"
    p[n].write[c] = Doubtful & last_write(n, c)
  ==> begin
    ended(n, c);
  end;

  rule "P.write_settled > lease.settled:QUARANTINED[!no_holder]"
    p[n].write[c] = Doubtful & !last_write(n, c)
  ==> begin
    ended(n, c);
  end;
end;

-- prefill: timers ------------------------------------------------------------------------------------------------------------

ruleset n: Life do
  rule "P.drain_deadline > lease.unknown:REVOKING"
    p[n].lease = Revoking
  ==> begin
    p_doubt(n);
  end;

  rule "P.repeat_verdict"
    p[n].linked & concluded(p[n].phase) & !p[n].drain_asked & !p[n].verdict_acked
  ==> begin
    tell(n);
  end;

  rule "P.repeat_drained"
    p[n].linked & concluded(p[n].phase) & p[n].drain_asked & !writing(n)
  ==> begin
    net_drained[p[n].gen] := true;
  end;
end;

rule "P.tombstone_lapses"
  EXPIRY = 1 & p_refuses
==> begin
  p_refuses := false;
end;

rule "P.early_offer_lapses"
  EXPIRY = 1 & parked[1] != 0
==> begin
  unpark(parked[1]);
end;

-- Nothing is owed to a decode that was given up, or is dead.
ruleset n: Life do
  rule "P.forgets"
    (SILENCES = 1 | d_dead) & p[n].linked & concluded(p[n].phase) & !writing(n)
  ==> begin
    unlink(n);
  end;
end;

-- If it comes back, it offers anew.
rule "P.forgets_offers"
  (SILENCES = 1 | d_dead) & parked[1] != 0
==> begin
  spent[parked[1]] := true;
  unpark(parked[1]);
end;

-- decode: the engine ---------------------------------------------------------------------------------------------------------

rule "D.open > room.peer_ready:BOOTSTRAPPING[all_peers_known] + lease.expose:PRIVATE"
  !d_dead & !d_is_open() & d_opened < GENS
==> begin
  d_open();
  offer(d_opened);
end;

rule "D.open > room.peer_ready:BOOTSTRAPPING[!all_peers_known]"
  LOOKUPS = 1 & !d_dead & !d_is_open() & d_opened < GENS
==> begin
  d_open();
  d[d_opened].linked := true;
end;

rule "D.open"
  LOOKUPS = 1 & !d_dead & !d_is_open() & d_opened < GENS
==> begin
  d_open();
end;

ruleset g: Gen do
  rule "D.found > room.peer_ready:BOOTSTRAPPING[!all_peers_known]"
    d[g].phase = Bootstrapping & !d[g].linked
  ==> begin
    d[g].linked := true;
  end;

  rule "D.found > room.peer_ready:BOOTSTRAPPING[all_peers_known] + lease.expose:PRIVATE"
    d[g].phase = Bootstrapping & !d[g].linked
  ==> begin
    offer(g);
  end;

  rule "D.welcome > room.peer_ready:BOOTSTRAPPING[all_peers_known] + lease.expose:PRIVATE"
    d[g].phase = Bootstrapping & d[g].linked
  ==> begin
    offer(g);
  end;

  rule "D.abort > room.fail:BOOTSTRAPPING + lease.conclude:PRIVATE"
    d[g].open & d_aborts > 0 & d[g].phase = Bootstrapping
  ==> begin
    d_aborts := d_aborts - 1;
    d_fail(g);
  end;

  rule "D.deadline > room.fail:BOOTSTRAPPING + lease.conclude:PRIVATE"
    timely() & d[g].open & d[g].phase = Bootstrapping
  ==> begin
    d_fail(g);
  end;

  rule "D.abort > room.fail:WAITING_FOR_INPUT + lease.conclude:EXPOSED[!no_holder]"
    d[g].open & d_aborts > 0 & d[g].phase = Waiting & VOUCHES != 1
  ==> begin
    d_aborts := d_aborts - 1;
    d_fail(g);
  end;

  rule "D.abort > room.fail:WAITING_FOR_INPUT + lease.conclude:EXPOSED[!no_holder] + lease.settled:REVOKING[no_holder]"
    d[g].open & d_aborts > 0 & d[g].phase = Waiting & VOUCHES = 1
  ==> begin
    d_aborts := d_aborts - 1;
    d_fail(g);
  end;

  rule "D.abort > room.fail:TRANSFERRING + lease.conclude:EXPOSED[!no_holder]"
    d[g].open & d_aborts > 0 & d[g].phase = Transferring & VOUCHES != 1
  ==> begin
    d_aborts := d_aborts - 1;
    d_fail(g);
  end;

  rule "D.abort > room.fail:TRANSFERRING + lease.conclude:EXPOSED[!no_holder] + lease.settled:REVOKING[no_holder]"
    d[g].open & d_aborts > 0 & d[g].phase = Transferring & VOUCHES = 1
  ==> begin
    d_aborts := d_aborts - 1;
    d_fail(g);
  end;

  rule "D.deadline > room.fail:WAITING_FOR_INPUT + lease.conclude:EXPOSED[!no_holder]"
    timely() & d[g].open & d[g].phase = Waiting & VOUCHES != 1
  ==> begin
    d_fail(g);
  end;

  rule "D.deadline > room.fail:WAITING_FOR_INPUT + lease.conclude:EXPOSED[!no_holder] + lease.settled:REVOKING[no_holder]"
    timely() & d[g].open & d[g].phase = Waiting & VOUCHES = 1
  ==> begin
    d_fail(g);
  end;

  rule "D.deadline > room.fail:TRANSFERRING + lease.conclude:EXPOSED[!no_holder]"
    timely() & d[g].open & d[g].phase = Transferring & VOUCHES != 1
  ==> begin
    d_fail(g);
  end;

  rule "D.deadline > room.fail:TRANSFERRING + lease.conclude:EXPOSED[!no_holder] + lease.settled:REVOKING[no_holder]"
    timely() & d[g].open & d[g].phase = Transferring & VOUCHES = 1
  ==> begin
    d_fail(g);
  end;

  rule "D.revoked > lease.settled:REVOKING[no_holder]"
    VOUCHES = 2 & d[g].lease = Revoking
  ==> begin
    d[g].lease := Quiesced;
  end;

  rule "D.revoked > lease.settled:QUARANTINED[no_holder]"
    VOUCHES = 2 & d[g].lease = Quarantined
  ==> begin
    d[g].lease := Quiesced;
  end;

  rule "D.clear"
    d[g].open & concluded(d[g].phase)
  ==> begin
    d[g].open := false;
    d_forget(g);
  end;
end;

-- decode: messages -----------------------------------------------------------------------------------------------------------

ruleset g: Gen; again: boolean do
  rule "D.accepted"
    !d_dead & net_accepted[g] & may(again)
  ==> begin
    take(net_accepted[g], again);
    d[g].offering := false;
  end;
end;

ruleset g: Gen; c: Chunk; last: boolean; again: boolean do
  rule "D.part"
    !d_dead & net_part[g][c][last] & may_notice(again) & !is_news(g, c)
  ==> begin
    take(net_part[g][c][last], again);
    d[g].offering := false;
  end;

  rule "D.part > room.start:WAITING_FOR_INPUT + room.part_settled:TRANSFERRING[!all_confirmed]"
    !d_dead & net_part[g][c][last] & may_notice(again) & is_news(g, c) & d[g].phase = Waiting & !completes(g, c, last)
  ==> begin
    take(net_part[g][c][last], again);
    part(g, c, last);
  end;

  rule "D.part > room.start:WAITING_FOR_INPUT + lease.settled:EXPOSED + room.part_settled:TRANSFERRING[all_confirmed] + lease.conclude:EXPOSED[no_holder]"
    !d_dead & net_part[g][c][last] & may_notice(again) & is_news(g, c) & d[g].phase = Waiting & completes(g, c, last)
  ==> begin
    take(net_part[g][c][last], again);
    part(g, c, last);
    d_succeed(g);
  end;

  rule "D.part > room.part_settled:TRANSFERRING[!all_confirmed]"
    !d_dead & net_part[g][c][last] & may_notice(again) & is_news(g, c) & d[g].phase = Transferring & !completes(g, c, last)
  ==> begin
    take(net_part[g][c][last], again);
    part(g, c, last);
  end;

  rule "D.part > lease.settled:EXPOSED + room.part_settled:TRANSFERRING[all_confirmed] + lease.conclude:EXPOSED[no_holder]"
    !d_dead & net_part[g][c][last] & may_notice(again) & is_news(g, c) & d[g].phase = Transferring & completes(g, c, last)
  ==> begin
    take(net_part[g][c][last], again);
    part(g, c, last);
    d_succeed(g);
  end;
end;

ruleset g: Gen; again: boolean do
  rule "D.success"
    !d_dead & net_success[g] & may(again) & !live(d[g].phase)
  ==> begin
    take(net_success[g], again);
    net_verdict_ack[g] := true;
  end;

  rule "D.success > room.start:WAITING_FOR_INPUT + lease.settled:EXPOSED + room.part_settled:TRANSFERRING[all_confirmed] + lease.conclude:EXPOSED[no_holder]"
    !d_dead & net_success[g] & may(again) & d[g].phase = Waiting
  ==> begin
    take(net_success[g], again);
    net_verdict_ack[g] := true;
    d_succeed(g);
  end;

  rule "D.success > lease.settled:EXPOSED + room.part_settled:TRANSFERRING[all_confirmed] + lease.conclude:EXPOSED[no_holder]"
    !d_dead & net_success[g] & may(again) & d[g].phase = Transferring
  ==> begin
    take(net_success[g], again);
    net_verdict_ack[g] := true;
    d_succeed(g);
  end;
end;

ruleset g: Gen; moved: boolean; again: boolean do
  rule "D.failure"
    !d_dead & net_failure[g][moved] & may(again) & !live(d[g].phase)
  ==> begin
    take(net_failure[g][moved], again);
    net_verdict_ack[g] := true;
  end;

  rule "D.failure > room.fail:WAITING_FOR_INPUT + lease.conclude:EXPOSED[!no_holder]"
    !d_dead & net_failure[g][moved] & may(again) & d[g].phase = Waiting & VOUCHES != 1
  ==> begin
    take(net_failure[g][moved], again);
    net_verdict_ack[g] := true;
    d_fail(g);
  end;

  rule "D.failure > room.fail:WAITING_FOR_INPUT + lease.conclude:EXPOSED[!no_holder] + lease.settled:REVOKING[no_holder]"
    !d_dead & net_failure[g][moved] & may(again) & d[g].phase = Waiting & VOUCHES = 1
  ==> begin
    take(net_failure[g][moved], again);
    net_verdict_ack[g] := true;
    d_fail(g);
  end;

  rule "D.failure > room.fail:TRANSFERRING + lease.conclude:EXPOSED[!no_holder]"
    !d_dead & net_failure[g][moved] & may(again) & d[g].phase = Transferring & VOUCHES != 1
  ==> begin
    take(net_failure[g][moved], again);
    net_verdict_ack[g] := true;
    d_fail(g);
  end;

  rule "D.failure > room.fail:TRANSFERRING + lease.conclude:EXPOSED[!no_holder] + lease.settled:REVOKING[no_holder]"
    !d_dead & net_failure[g][moved] & may(again) & d[g].phase = Transferring & VOUCHES = 1
  ==> begin
    take(net_failure[g][moved], again);
    net_verdict_ack[g] := true;
    d_fail(g);
  end;
end;

ruleset g: Gen; again: boolean do
  rule "D.drained"
    !d_dead & net_drained[g] & may(again) & !awaits_drained(g)
  ==> begin
    take(net_drained[g], again);
    drained(g);
  end;

  rule "D.drained > lease.settled:REVOKING[no_holder]"
    !d_dead & net_drained[g] & may(again) & awaits_drained(g) & d[g].lease = Revoking
  ==> begin
    take(net_drained[g], again);
    drained(g);
  end;

  rule "D.drained > lease.settled:QUARANTINED[no_holder]"
    !d_dead & net_drained[g] & may(again) & awaits_drained(g) & d[g].lease = Quarantined
  ==> begin
    take(net_drained[g], again);
    drained(g);
  end;
end;

-- decode: timers -------------------------------------------------------------------------------------------------------------

ruleset g: Gen do
  rule "D.drain_deadline > lease.unknown:REVOKING"
    d[g].lease = Revoking
  ==> begin
    d[g].lease := Quarantined;
  end;

  rule "D.writer_dead > lease.settled:REVOKING[no_holder]"
    p_dead & d[g].linked & d[g].lease = Revoking
  ==> begin
    d[g].lease := Quiesced;
    d_unlink(g);
  end;

  rule "D.writer_dead > lease.settled:QUARANTINED[no_holder]"
    p_dead & d[g].linked & d[g].lease = Quarantined
  ==> begin
    d[g].lease := Quiesced;
    d_unlink(g);
  end;

  rule "D.writer_dead > room.fail:WAITING_FOR_INPUT + lease.settled:EXPOSED + lease.conclude:EXPOSED[no_holder]"
    p_dead & d[g].phase = Waiting
  ==> begin
    d_mourn(g);
  end;

  rule "D.writer_dead > room.fail:TRANSFERRING + lease.settled:EXPOSED + lease.conclude:EXPOSED[no_holder]"
    p_dead & d[g].phase = Transferring
  ==> begin
    d_mourn(g);
  end;

  rule "D.writer_dead"
    p_dead & d[g].linked & d[g].phase = Failed & d[g].lease = Quiesced
  ==> begin
    d_unlink(g);
  end;

  rule "D.repeat_offer"
    d[g].offering
  ==> begin
    net_offer[g] := true;
  end;

  rule "D.repeat_abort"
    d[g].linked & d[g].phase = Failed
  ==> begin
    net_abort[g] := true;
  end;
end;

-- processes that die -----------------------------------------------------------------------------------------------------------

-- All that the process knew is gone, its writes with it; what it had sent is not.
rule "env.p_dies"
  P_DEATHS > 0 & !p_dead
==> begin
  p_dead := true;
  p_refuses := false;
  for n: Life do
    for c: Chunk do
      p[n].write[c] := None;
    end;
    p[n].open := false;
    if p[n].linked then
      unlink(n);
    end;
    p[n].chunks := 0;
    p[n].closed := false;
    p_forget(n);
  end;
  clear parked;
  for g: Gen do
    spent[g] := false;
  end;
end;

rule "env.d_dies"
  D_DEATHS > 0 & !d_dead
==> begin
  d_dead := true;
  for g: Gen do
    d[g].open := false;
    d_conclude(g);
    d_unlink(g);
  end;
end;

-- the network and the data plane ----------------------------------------------------------------------------------------------

ruleset n: Life; c: Chunk do
  rule "env.placed"
    NOTIFIES = 2 & p[n].write[c] = Busy & may_be_done(n, c)
  ==> begin
    place(n, c);
    net_part[p[n].gen][c][is_last(n, c)] := true;
    p[n].write[c] := Placed;
  end;
end;

ruleset g: Gen do
  rule "net.lose offer" losses > 0 & net_offer[g] ==> begin
    losses := losses - 1;
    net_offer[g] := false;
  end;
end;

ruleset g: Gen do
  rule "net.lose abort" losses > 0 & net_abort[g] ==> begin
    losses := losses - 1;
    net_abort[g] := false;
  end;
end;

ruleset g: Gen do
  rule "net.lose verdict_ack" losses > 0 & net_verdict_ack[g] ==> begin
    losses := losses - 1;
    net_verdict_ack[g] := false;
  end;
end;

ruleset g: Gen do
  rule "net.lose drained_ack" losses > 0 & net_drained_ack[g] ==> begin
    losses := losses - 1;
    net_drained_ack[g] := false;
  end;
end;

ruleset g: Gen do
  rule "net.lose accepted" losses > 0 & net_accepted[g] ==> begin
    losses := losses - 1;
    net_accepted[g] := false;
  end;
end;

ruleset g: Gen do
  rule "net.lose success" losses > 0 & net_success[g] ==> begin
    losses := losses - 1;
    net_success[g] := false;
  end;
end;

ruleset g: Gen do
  rule "net.lose drained" losses > 0 & net_drained[g] ==> begin
    losses := losses - 1;
    net_drained[g] := false;
  end;
end;

ruleset g: Gen; moved: boolean do
  rule "net.lose failure" losses > 0 & net_failure[g][moved] ==> begin
    losses := losses - 1;
    net_failure[g][moved] := false;
  end;
end;

ruleset g: Gen; c: Chunk; last: boolean do
  rule "net.lose part" NOTIFIES = 0 & losses > 0 & net_part[g][c][last] ==> begin
    losses := losses - 1;
    net_part[g][c][last] := false;
  end;
end;


-- what must hold -----------------------------------------------------------------------------------------------------------------

invariant "one life of a room is open at a time"
  forall a: Life do forall b: Life do p[a].open & p[b].open -> a = b end end &
  forall a: Gen do forall b: Gen do d[a].open & d[b].open -> a = b end end;

invariant "decode's pages come back only when no write can land in them"
  VOUCHES = 0 -> forall n: Life do forall c: Chunk do
    !d_dead & (p[n].write[c] = Busy | p[n].write[c] = Doubtful) ->
      d[p[n].gen].lease = Exposed | d[p[n].gen].lease = Revoking | d[p[n].gen].lease = Quarantined
  end end;

invariant "prefill's pages come back only when no write reads them"
  forall n: Life do
    writing(n) -> p[n].lease = Exposed | p[n].lease = Revoking | p[n].lease = Quarantined
  end;

invariant "a room that concluded has its pages, or somebody is named who may touch them"
  forall n: Life do
    concluded(p[n].phase) -> (writing(n) ? p[n].lease = Revoking | p[n].lease = Quarantined : p[n].lease = Quiesced)
  end &
  forall g: Gen do
    (d[g].phase = Success -> d[g].lease = Quiesced) &
    (d[g].phase = Failed & !d[g].linked -> d[g].lease = Quiesced)
  end;

invariant "a transfer has one room at prefill"
  forall a: Life do forall b: Life do p[a].linked & p[b].linked & p[a].gen = p[b].gen -> a = b end end;

invariant "what concluded at prefill is not open there"
  forall g: Gen do spent[g] -> !is_bound(g) & !is_parked(g) end;

invariant "Drained is true, and stays true"
  !p_dead -> forall g: Gen do
    net_drained[g] -> spent[g] |
      exists n: Life do bound(n, g) & p[n].drain_asked & concluded(p[n].phase) & !writing(n) end
  end;

invariant "a room that is open or linked is known, and a live one is both"
  forall n: Life do
    (p[n].open | p[n].linked -> p[n].phase != Gone) & (live(p[n].phase) -> p[n].open) &
    (p[n].phase = Waiting | p[n].phase = Transferring -> p[n].linked) & (p[n].linked -> p[n].gen != 0)
  end &
  forall g: Gen do
    (d[g].open | d[g].linked -> d[g].phase != Gone) & (live(d[g].phase) -> d[g].open) &
    (d[g].phase = Waiting | d[g].phase = Transferring -> d[g].linked)
  end;

invariant "a live room has its memory to itself, or exposed"
  forall n: Life do live(p[n].phase) -> p[n].lease = Private | p[n].lease = Exposed end &
  forall g: Gen do live(d[g].phase) -> d[g].lease = Private | d[g].lease = Exposed end;

invariant "a verdict is true"
  !p_dead -> forall g: Gen do
    (net_success[g] -> spent[g] | exists n: Life do bound(n, g) & p[n].phase = Success end) &
    (net_failure[g][false] | net_failure[g][true] -> spent[g] | exists n: Life do bound(n, g) & p[n].phase = Failed end)
  end;

invariant "nobody waits for somebody who has forgotten it"
  !p_dead & SILENCES = 0 -> forall g: Gen do
    d[g].phase = Waiting | d[g].phase = Transferring ->
      d[g].offering | is_bound(g) | net_success[g] | net_failure[g][false] | net_failure[g][true] |
      exists c: Chunk do net_part[g][c][false] | net_part[g][c][true] end
  end;

invariant "an offer that waits can be answered"
  forall i: Gen do i < GENS -> (parked[i] = 0 -> parked[i + 1] = 0) end &
  forall a: Gen do forall b: Gen do parked[a] != 0 & parked[a] = parked[b] -> a = b end end &
  (p_is_open() -> parked[1] = 0);

liveness "both rooms conclude, all memory comes back, nothing is owed"
  forall n: Life do p[n].phase = Gone end & forall g: Gen do d[g].phase = Gone end & parked[1] = 0;
