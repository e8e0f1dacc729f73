package relay

import (
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// roleCheck checks whether one member is a learner, on the connection that calls use. A voting
// member never becomes a learner, so the result holds as long as the connection.
type roleCheck struct {
	conn *upstreamConn
	was  bool // a learner, at the last check
	once sync.Once
}

// queryRole starts a check of the member. was is the result of the last one. Calls may use the
// connection when the check ends, or after upstream.RoleTimeout.
func (u *upstreamConn) queryRole(was bool) {
	check := &roleCheck{conn: u, was: was}
	scheme, authority := u.session.id.Upstream.Origin(u.endpoint.url)
	stream := u.conn.Open(check, []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: scheme}, {Name: ":path", Value: healthpb.Health_Check_FullMethodName},
		{Name: ":authority", Value: authority}, {Name: "content-type", Value: rpc.ContentType}, {Name: "te", Value: "trailers"},
		{Name: upstream.MarkHeader, Value: upstream.MarkValue[0]},
	}, false)
	if stream == nil {
		check.end(was)
		return
	}
	stream.Data(true, rpc.Header(0), nil)
	time.AfterFunc(upstream.RoleTimeout, func() {
		stream.Reset(http2.ErrCodeCancel)
		check.end(was)
		u.session.flush()
	})
}

// end takes the result. Only the first counts.
func (c *roleCheck) end(learner bool) {
	c.once.Do(func() { c.conn.offer(learner) })
}

// headers takes the response of the member.
func (c *roleCheck) headers(stream *http2conn.Stream, fields []hpack.HeaderField, end bool) {
	if !end {
		return
	}
	learner := false
	for _, f := range fields {
		learner = learner || f.Name == "grpc-message" && f.Value == upstream.LearnerRefusalText
	}
	c.end(learner)
	stream.Finish()
}

// offer lets calls use the connection: all calls or, of a learner, those for which there is no
// other member.
func (u *upstreamConn) offer(learner bool) {
	u.session.mu.Lock()
	defer u.session.mu.Unlock()
	if u.removed {
		return
	}
	u.usable = true
	h := u.endpoint
	h.upstream, h.conn, h.dialing, h.pause = u, u.conn, false, 0
	h.learner, h.nextRoleCheck = learner, time.Now().Add(upstream.RoleInterval)
	u.session.notifyChanged()
}

// recheckRole checks a learner again after upstream.RoleInterval: it may have been promoted. The
// caller holds the session's mu.
func (h *endpointState) recheckRole() {
	now := time.Now()
	if now.Before(h.nextRoleCheck) {
		return
	}
	h.nextRoleCheck = now.Add(upstream.RoleTimeout + upstream.RoleInterval)
	conn := h.upstream
	if conn.session.ended {
		return
	}
	conn.session.work.Go(func() {
		conn.queryRole(true)
		conn.session.flush()
	})
}
