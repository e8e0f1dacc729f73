package linear

import (
	"context"
	"slices"
	"sort"
	"sync"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/canary"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// election is what clients were told in one election, to be compared with what happened, revision
// by revision.
type election struct {
	site      *site
	name      string
	set       *canary.Set
	start     int64 // the first revision
	observers []*observer

	mu      sync.Mutex
	tried   map[string]bool // every value that was written; true if it was refused
	claims  []claim
	answers []claim
}

// claim is what a client was told of a leader.
type claim struct {
	token, revision int64
	value           string
	leads           bool // it was the leader at that revision
}

// event is a change of a candidate's key.
type event struct {
	key             string
	token, revision int64
	value           string
	gone            bool
}

func (s *site) election(t *testing.T, h *history, name string) *election {
	t.Helper()
	e := &election{site: s, name: name, set: s.Sealed, tried: make(map[string]bool)}
	if name[:3] == "/u/" {
		e.set = s.Clear
	}
	harness.Eventually(t, within, "the revision", func() error {
		ctx, cancel := answer(t.Context())
		defer cancel()
		r, err := s.etcd.Get(ctx, name)
		if err == nil {
			e.start = r.Header.Revision + 1
		}
		return err
	})
	return e
}

func (e *election) try(value string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.tried[value] = false
}

func (e *election) refuse(value string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.tried[value] = true
}

func (e *election) claim(c claim) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.claims = append(e.claims, c)
}

func (e *election) recordAnswer(r *v3electionpb.LeaderResponse) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.answers = append(e.answers, claim{r.Kv.CreateRevision, r.Header.Revision, string(r.Kv.Value), true})
}

// reader asks by the library, without a session.
func (e *election) reader(ctx context.Context, c *clientv3.Client) (*v3electionpb.LeaderResponse, error) {
	s, err := concurrency.NewSession(c, concurrency.WithLease(-1), concurrency.WithContext(ctx))
	if err != nil {
		return nil, err
	}
	s.Orphan()
	r, err := concurrency.NewElection(s, e.name).Leader(ctx)
	if err != nil {
		return nil, err
	}
	return &v3electionpb.LeaderResponse{Header: r.Header, Kv: r.Kvs[0]}, nil
}

// happened reads etcd's history through a proxy.
func (e *election) happened(t *testing.T) (events []event) {
	t.Helper()
	c := library(t, "http://"+e.site.proxies[0].Address)
	last := e.name + "/~"
	harness.Eventually(t, within, "the end of an election", func() error {
		ctx, cancel := answer(t.Context())
		defer cancel()
		_, err := c.Put(ctx, last, e.set.Value("end"))
		return err
	})
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	for r := range c.Watch(ctx, e.name+"/", clientv3.WithPrefix(), clientv3.WithRev(e.start)) {
		if r.Err() != nil {
			t.Fatal(r.Err())
		}
		for _, ev := range r.Events {
			if string(ev.Kv.Key) == last {
				return events
			}
			events = append(events, event{string(ev.Kv.Key), ev.Kv.CreateRevision, ev.Kv.ModRevision, string(ev.Kv.Value), ev.Type == clientv3.EventTypeDelete})
		}
	}
	t.Fatalf("the history of %s ended too early", e.name)
	return nil
}

// verify compares what clients were told with what happened.
func (e *election) verify(t *testing.T) {
	t.Helper()
	events := e.happened(t)
	written := make(map[int64]event) // by its revision: each writes one key
	var leaders []event              // in the order of revisions: who has led since
	candidates := make(map[string]event)
	values := make(map[string]bool)
	for i, ev := range events {
		if ev.gone {
			delete(candidates, ev.key)
		} else {
			refused, tried := e.tried[ev.value]
			if !tried || refused || values[ev.value] {
				t.Errorf("%s: the value at revision %d was never asked for, or refused, or is there for the second time", e.name, ev.revision)
			}
			values[ev.value] = true
			candidates[ev.key], written[ev.revision] = ev, ev
		}
		if i+1 < len(events) && events[i+1].revision == ev.revision {
			continue // a lease deleted several keys
		}
		now := event{revision: ev.revision}
		for _, c := range candidates {
			if now.token == 0 || c.token < now.token {
				now = c
			}
		}
		if n := len(leaders); n > 0 && now.token != 0 && now.token < leaders[n-1].token {
			t.Errorf("%s: the leader of revision %d is older than the one before", e.name, ev.revision)
		}
		leaders = append(leaders, event{token: now.token, value: now.value, revision: ev.revision})
	}
	at := func(revision int64) event {
		n := sort.Search(len(leaders), func(i int) bool { return leaders[i].revision > revision })
		if n == 0 {
			return event{}
		}
		return leaders[n-1]
	}
	for _, c := range slices.Concat(e.claims, e.answers) {
		if got := at(c.revision); c.leads && (got.token != c.token || got.value != c.value) {
			t.Errorf("%s: who was created at revision %d is said to lead at %d, where %d led, or with another value", e.name, c.token, c.revision, got.token)
		}
	}
	for _, c := range e.claims {
		if got := written[c.revision]; got.token != c.token || got.value != c.value {
			t.Errorf("%s: what the candidate of revision %d was told to have written at %d is not there", e.name, c.token, c.revision)
		}
	}
	messages := 0
	for _, o := range e.observers {
		messages += o.verify(t, events)
	}
	t.Logf("%s: %d events, %d claims, %d answers, %d messages to observers", e.name, len(events), len(e.claims), len(e.answers), messages)
}

// observer receives the leaders.
type observer struct {
	*holder
	*election
	service bool
	streams [][]event // what each call received
}

// observe observes until the call ends.
func (o *observer) observe(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	o.streams = append(o.streams, nil)
	note := func(r *v3electionpb.LeaderResponse) {
		o.answered(o.id, 1)
		n := len(o.streams) - 1
		o.streams[n] = append(o.streams[n], event{string(r.Kv.Key), r.Kv.CreateRevision, r.Kv.ModRevision, string(r.Kv.Value), false})
	}
	if o.service {
		stream, err := o.votes.Observe(ctx, &v3electionpb.LeaderRequest{Name: []byte(o.name)})
		for err == nil {
			var r *v3electionpb.LeaderResponse
			if r, err = stream.Recv(); err == nil {
				note(r)
			}
		}
		return
	}
	s, err := concurrency.NewSession(o.library, concurrency.WithLease(-1), concurrency.WithContext(ctx))
	if err != nil {
		return
	}
	s.Orphan()
	for r := range concurrency.NewElection(s, o.name).Observe(ctx) {
		note(&v3electionpb.LeaderResponse{Header: r.Header, Kv: r.Kvs[0]})
	}
}

// verify checks that an observer received what happened, in order, and of each leader every value
// from the first one received. A new call may begin with the last value of the previous one.
func (o *observer) verify(t *testing.T, events []event) (messages int) {
	t.Helper()
	index := make(map[event]int, len(events))
	var last event
	for i, ev := range events {
		index[ev] = i
	}
	for _, told := range o.streams {
		for n, ev := range told {
			messages++
			i, ok := index[ev]
			if !ok {
				t.Errorf("%s: an observer was told of revision %d what did not happen", o.name, ev.revision)
				continue
			}
			// The first value of a leader is from its campaign, and may be older than the last
			// value of the previous leader.
			switch {
			case ev.token < last.token || ev.token == last.token && (ev.revision < last.revision || n > 0 && ev.revision == last.revision):
				t.Errorf("%s: an observer was told of %d, leader since %d, after %d, leader since %d", o.name, ev.revision, ev.token, last.revision, last.token)
			case n > 0 && ev.token == last.token && slices.ContainsFunc(events[index[last]+1:i], func(e event) bool { return e.key == ev.key && !e.gone }):
				t.Errorf("%s: an observer missed a value between revisions %d and %d", o.name, last.revision, ev.revision)
			}
			last = ev
		}
	}
	return messages
}
