package proxy

import (
	"context"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// A learner of etcd's serves Status, serializable reads and snapshots, and refuses every other call. etcd's client
// library then tries another of its endpoints. A client of the proxy has one endpoint alone, so the proxy keeps
// calls off learners while another member is connected.
//
// A member is asked for its health, which a learner refuses like any other call and before it looks for a user.
// Status tells more, but needs a token from etcd 3.7 on where authentication is on.

// Times of the question whether a member is a learner.
const (
	roleTimeout = time.Second     // after which a member counts as one that votes
	roleAgain   = 2 * time.Second // between two questions to a learner, which may have been promoted
)

// learnerRefusal is the message of a learner that does not serve a call. The code is not the same in all versions.
var learnerRefusal = status.Convert(rpctypes.ErrGRPCNotSupportedForLearner).Message()

// refusedByLearner reports whether err is a learner's refusal. A learner refuses a call before it looks into it, so
// nothing of the call was done, and the call may be made once more on another member.
func refusedByLearner(err error) bool {
	return err != nil && status.Convert(err).Message() == learnerRefusal
}

// refusal returns what etcd says to a call that learners refuse, if it is a learner, and otherwise nil. The call is the
// question for its health.
func (u *upstream) refusal(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(upstreamContext(ctx), readyWait)
	defer cancel()
	out := new(frame)
	defer out.free()
	err := u.conn.Invoke(ctx, healthpb.Health_Check_FullMethodName, new(frame), out)
	if !refusedByLearner(err) {
		return nil
	}
	return err
}

// servedByLearner reports whether a learner serves a call. in is the request of a unary call, and nil for a stream.
func (m *method) servedByLearner(in *frame) bool {
	switch m.full {
	case pb.Maintenance_Status_FullMethodName, pb.Maintenance_Snapshot_FullMethodName:
		return true
	case pb.KV_Range_FullMethodName:
		var r pb.RangeRequest
		return proto.Unmarshal(in.data.Materialize(), &r) == nil && r.Serializable
	}
	return false
}

// roleCheck is the question to one member whether it is a learner, asked on the connection that calls go over. A
// process that votes never becomes a learner, so the answer holds as long as the connection does.
type roleCheck struct {
	side   *upside
	was    bool // a learner, when it was asked
	answer sync.Once
}

// askRole asks the member, which was a learner the last time or not. The connection is offered to calls once that is
// known, or after roleTimeout.
func (u *upside) askRole(was bool) {
	check := &roleCheck{side: u, was: was}
	scheme, authority := u.session.id.to.origin(u.hop.endpoint)
	stream := u.conn.Open(check, []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: scheme}, {Name: ":path", Value: healthpb.Health_Check_FullMethodName},
		{Name: ":authority", Value: authority}, {Name: "content-type", Value: contentType}, {Name: "te", Value: "trailers"},
		{Name: meantForEtcd, Value: markOfEtcd[0]},
	}, false)
	if stream == nil {
		check.end(was)
		return
	}
	stream.Data(true, head(0), nil)
	time.AfterFunc(roleTimeout, func() {
		stream.Reset(http2.ErrCodeCancel)
		check.end(was)
		u.session.flush()
	})
}

// end notes the answer. Only the first counts.
func (c *roleCheck) end(learner bool) {
	c.answer.Do(func() { c.side.offer(learner) })
}

// headers is what the member answers.
func (c *roleCheck) headers(stream *http2conn.Stream, fields []hpack.HeaderField, end bool) {
	if !end {
		return
	}
	learner := false
	for _, f := range fields {
		learner = learner || f.Name == "grpc-message" && f.Value == learnerRefusal
	}
	c.end(learner)
	stream.Finish()
}

// offer has calls go over the connection: all, or of a learner those that no other member is there for.
func (u *upside) offer(learner bool) {
	u.session.mu.Lock()
	defer u.session.mu.Unlock()
	if u.gone {
		return
	}
	u.greeted = true
	h := u.hop
	h.side, h.conn, h.dialing, h.pause = u, u.conn, false, 0
	h.learner, h.ask = learner, time.Now().Add(roleAgain)
	u.session.tell()
}

// lookAgain asks a learner once more, now and then: it may have been promoted. The caller holds the session's mu.
func (h *hop) lookAgain() {
	now := time.Now()
	if now.Before(h.ask) {
		return
	}
	h.ask = now.Add(roleTimeout + roleAgain)
	side := h.side
	if side.session.ended {
		return
	}
	side.session.work.Go(func() {
		side.askRole(true)
		side.session.flush()
	})
}
