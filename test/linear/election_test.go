package linear

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// etcd promises for an election that the leader is the candidate with the oldest key (its revision
// of creation is the token), and that a proclamation succeeds only while the key exists. A key may
// disappear at any time, like that of a lock. A candidate that is told that it has won had the
// oldest key at some moment of its call.
type (
	won struct { // a campaign ended
		token int64
		value string
	}
	proclaimed struct {
		token int64
		value string
	}
	lost     struct{ token int64 } // a proclamation was refused
	resigned struct{ token int64 } // or the lease was revoked
	leads    struct {              // a request for the leader was answered
		token int64
		value string
	}
	nobody struct{} // there was no leader
)

// ballot is an election.
type ballot struct {
	token int64 // of the newest leader
	gone  bool  // that is known to be no leader any more
	value string
}

func electing(state, in any) (bool, any) {
	s := state.(ballot)
	switch i := in.(type) {
	case won:
		// otherwise it was seen before, or its key disappeared while it waited
		if i.token > s.token {
			s = ballot{token: i.token, value: i.value}
		}
		return true, s
	case leads:
		// it has won, and does not know yet
		if i.token > s.token && !strings.Contains(i.value, "-proclaim-") {
			s = ballot{token: i.token, value: i.value}
		}
		return i.token == s.token && !s.gone && i.value == s.value, s
	case proclaimed:
		ok := i.token == s.token && !s.gone
		s.value = i.value
		return ok, s
	case lost:
		s.gone = s.gone || i.token == s.token
		return i.token <= s.token, s
	case resigned:
		s.gone = s.gone || i.token == s.token
		return i.token <= s.token, s
	case nobody:
		s.gone = true
		return true, s
	}
	return false, s
}

// TestElections has clients campaign, lead, ask for the leader and observe, through etcd's Election
// service and its client library.
func TestElections(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.rounds(t, func(t *testing.T, round string) {
		h := newHistory()
		var work []func(context.Context)
		var all []*voter
		var elections []*election
		for prefix, clients := range map[string][]struct {
			via     int
			service bool
		}{
			"/s/": {{0, true}, {1, true}, {0, false}, {1, false}}, // every key encrypted
			// without a rule: the service is etcd's
			"/u/": {{0, true}, {direct, false}, {direct, true}},
		} {
			e := s.election(t, h, prefix+"election-"+round)
			elections = append(elections, e)
			for n, c := range clients {
				v := &voter{holder: s.holder(t, h, len(work), c.via), election: e, service: c.service}
				all, work = append(all, v), append(work, v.stand)
				if n > 1 { // and by another way than the first two
					v := &voter{holder: s.holder(t, h, len(work), c.via), election: e, service: n == 2}
					work = append(work, v.ask)
				}
				o := &observer{holder: s.holder(t, h, len(work), c.via), election: e, service: c.service}
				e.observers, work = append(e.observers, o), append(work, o.observe)
			}
		}
		s.round(t, h, work, func() error {
			for _, v := range all {
				if v.turns.Load() < 2 || v.refusals.Load() < 1 {
					return fmt.Errorf("a client of %s led %d times, and was refused %d times", v.name, v.turns.Load(), v.refusals.Load())
				}
			}
			return nil
		})
		for _, v := range all {
			t.Logf("%s, service %t, round the proxies %t: led %d times, refused %d times", v.name, v.service, v.around, v.turns.Load(), v.refusals.Load())
			v.judge(t)
		}
		for _, e := range elections {
			e.verify(t)
		}
		h.check(t, electing, ballot{})
	})
}

// voter is a candidate, or a client that asks for the leader.
type voter struct {
	*holder
	*election
	service bool // otherwise the library
	own     *concurrency.Election
	leader  *v3electionpb.LeaderKey
}

func (v *voter) fresh(kind string) string {
	v.n++
	value := v.set.Value(fmt.Sprintf("%s-%d-%d", kind, v.id, v.n))
	v.try(value)
	return value
}

// stand is one candidacy: it campaigns, proclaims, and stops leading in one of several ways. Then
// it proclaims once more, which must fail.
func (v *voter) stand(ctx context.Context) {
	lease, session, end := v.session(ctx)
	if session == nil {
		return
	}
	defer end()
	v.own, v.leader = concurrency.NewElection(session, v.name), &v3electionpb.LeaderKey{Lease: int64(lease)}
	if !v.campaign(ctx, "campaign") {
		return
	}
	for range 1 + rand.IntN(3) {
		if !v.proclaim(ctx) {
			return
		}
		sleep(ctx, between(0, 10)) // so that others can see it
	}
	if rand.IntN(3) == 0 && !v.campaign(ctx, "again") {
		return
	}
	v.turns.Add(1)
	call := v.now()
	switch rand.IntN(16) {
	case 0, 1: // the lease ends, as if it was not kept alive, and the leader does not know
		if v.revoke(ctx, lease) != nil {
			return
		}
	case 2: // it is not kept alive
		session.Orphan()
		sleep(ctx, between(1000, 4000))
		v.proclaim(ctx)
		return
	default:
		if v.resign(ctx) != nil {
			return
		}
	}
	v.revoked = true
	v.add(record{client: v.id, key: v.name, call: call, in: resigned{v.leader.Rev}})
	v.own = concurrency.ResumeElection(session, v.name+"/", string(v.leader.Key), v.leader.Rev)
	v.proclaim(ctx)
}

// campaign waits until it has won. A second campaign of the leader is a proclamation, in which the
// values are compared.
func (v *voter) campaign(ctx context.Context, kind string) bool {
	waiting, cancel := context.WithTimeout(ctx, 2*patient)
	defer cancel()
	value, before := v.fresh(kind), v.leader.Rev
	r := record{client: v.id, key: v.name, call: v.now(), wrote: place(before, value)}
	var revision int64
	var err error
	if v.service {
		var got *v3electionpb.CampaignResponse
		got, err = v.votes.Campaign(waiting, &v3electionpb.CampaignRequest{Name: []byte(v.name), Lease: v.leader.Lease, Value: []byte(value)})
		if err == nil {
			v.leader, revision = got.Leader, got.Header.Revision
		}
	} else if err = v.own.Campaign(waiting, value); err == nil {
		v.leader = &v3electionpb.LeaderKey{Name: []byte(v.name), Key: []byte(v.own.Key()), Rev: v.own.Rev(), Lease: v.leader.Lease}
		revision = v.own.Header().Revision
	}
	r.in, r.unknown = proclaimed{before, value}, err != nil
	if err == nil {
		v.answered(v.id, 1)
		if v.leader.Rev != before {
			r.in, revision = won{v.leader.Rev, value}, v.leader.Rev
		}
		if kind == "campaign" || v.leader.Rev != before {
			v.claim(claim{v.leader.Rev, revision, value, false})
		}
	}
	v.add(r)
	return err == nil
}

// proclaim reports whether it succeeded.
func (v *voter) proclaim(ctx context.Context) bool {
	asking, cancel := answer(ctx)
	defer cancel()
	value := v.fresh("proclaim")
	r := record{client: v.id, key: v.name, call: v.now(), in: proclaimed{v.leader.Rev, value}, wrote: place(v.leader.Rev, value)}
	var revision int64
	var err error
	if v.service {
		var got *v3electionpb.ProclaimResponse
		got, err = v.votes.Proclaim(asking, &v3electionpb.ProclaimRequest{Leader: v.leader, Value: []byte(value)})
		revision = got.GetHeader().GetRevision()
	} else if err = v.own.Proclaim(asking, value); err == nil {
		revision = v.own.Header().Revision
	}
	refused := says(err, concurrency.ErrElectionNotLeader)
	if r.unknown = err != nil && !refused; r.unknown {
		v.add(r)
		return false
	}
	v.answered(v.id, 1)
	if !refused {
		v.add(r)
		v.claim(claim{v.leader.Rev, revision, value, true})
		return true
	}
	r.in, r.wrote = lost{v.leader.Rev}, ""
	v.add(r)
	v.refuse(value)
	v.refusals.Add(1)
	got, err := v.kv.Range(asking, &pb.RangeRequest{Key: []byte(v.leaseKey)})
	if err == nil && len(got.Kvs) > 0 && !v.revoked {
		v.wrong("a leader was refused, and its lease is there")
	}
	return false
}

func (v *voter) resign(ctx context.Context) error {
	asking, cancel := answer(ctx)
	defer cancel()
	if v.service {
		_, err := v.votes.Resign(asking, &v3electionpb.ResignRequest{Leader: v.leader})
		return err
	}
	return v.own.Resign(asking)
}

// ask requests the leader.
func (v *voter) ask(ctx context.Context) {
	asking, cancel := answer(ctx)
	defer cancel()
	r := record{client: v.id, key: v.name, call: v.now(), in: nobody{}}
	var got *v3electionpb.LeaderResponse
	var err error
	if v.service {
		got, err = v.votes.Leader(asking, &v3electionpb.LeaderRequest{Name: []byte(v.name)})
	} else {
		got, err = v.reader(asking, v.library)
	}
	if err != nil && !says(err, concurrency.ErrElectionNoLeader) {
		return
	}
	if kv := got.GetKv(); kv != nil {
		r.in, r.saw = leads{kv.CreateRevision, string(kv.Value)}, place(kv.CreateRevision, string(kv.Value))
		v.recordAnswer(got)
	}
	v.answered(v.id, 1)
	v.add(r)
}

// says reports whether an error is the given one of the library, or the same as returned by the
// service.
func says(err, want error) bool {
	s, ok := status.FromError(err)
	return errors.Is(err, want) || err != nil && ok && s.Code() == codes.Unknown && s.Message() == want.Error()
}

// place distinguishes a value of one leader from the same value of another.
func place(token int64, value string) string { return fmt.Sprintf("%d %s", token, value) }
