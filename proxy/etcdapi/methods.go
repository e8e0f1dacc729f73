package etcdapi

import (
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
)

// class says what the proxy does with a method.
type class string

// The classes. A method without one is answered as etcd answers a method it does not know.
const (
	classPass    class = "pass"    // carries no value: forwarded untouched
	classRewrite class = "rewrite" // may carry values: encrypted and decrypted under the rules
	// classMembers: the response names the URLs of members, which listeners may put theirs in place
	// of
	classMembers class = "members"
	// classCheck: carries no value: forwarded untouched, unless this client may not send it
	classCheck class = "check"
	// classDelete: deletes keys that it does not name: the proxy gets them from etcd first
	classDelete class = "delete"
	classHost   class = "host" // served in the proxy if a rule covers its keys, otherwise forwarded
)

// Shape says how many messages a method moves.
type Shape int

// The shapes of methods.
const (
	ShapeUnary        Shape = iota // one request, one response
	ShapeServerStream              // one request, a stream of responses
	ShapeBidiStream                // streams of both
)

// Method is one row of the closed method table.
type Method struct {
	service, name string
	Path          string // "/service/name"
	class         class
	access        access // what a client that may only read can do with it
	Shape         Shape
	// Indefinite is true for a call without an end. It ends with Unavailable when the proxy drains,
	// so that its client connects to another proxy. All other calls are finished.
	Indefinite bool
	// call makes the rewriter of one call; nil for what is forwarded untouched.
	call newCall

	api     *API
	Metrics *metrics.Method
	Relayed bool // its frames are relayed if a request is like those of etcd's clients
}

// MethodTable is every method of every service that etcd 3.4 to 3.7 registers for clients. A method
// that is not here is never forwarded: a new write method could store plaintext.
func MethodTable() []*Method {
	table := []*Method{
		{service: "etcdserverpb.KV", name: "Range", class: classRewrite, access: reads, call: newRangeCall},
		{service: "etcdserverpb.KV", name: "RangeStream", class: classRewrite, access: reads, Shape: ShapeServerStream, call: newRangeStreamCall},
		{service: "etcdserverpb.KV", name: "Put", class: classRewrite, call: newPutCall},
		{service: "etcdserverpb.KV", name: "DeleteRange", class: classRewrite, call: newDeleteCall},
		{service: "etcdserverpb.KV", name: "Txn", class: classRewrite, access: either, call: newTxnCall},
		{service: "etcdserverpb.KV", name: "Compact", class: classPass},

		{service: "etcdserverpb.Watch", name: "Watch", class: classRewrite, access: reads, Shape: ShapeBidiStream, Indefinite: true, call: newWatchCall},

		{service: "etcdserverpb.Lease", name: "LeaseGrant", class: classPass},
		{service: "etcdserverpb.Lease", name: "LeaseRevoke", class: classDelete, call: newRevokeCall},
		{service: "etcdserverpb.Lease", name: "LeaseKeepAlive", class: classPass, Shape: ShapeBidiStream, Indefinite: true},
		{service: "etcdserverpb.Lease", name: "LeaseTimeToLive", class: classPass, access: reads},
		{service: "etcdserverpb.Lease", name: "LeaseLeases", class: classPass, access: reads},

		{service: "etcdserverpb.Cluster", name: "MemberAdd", class: classMembers, call: members(new(pb.MemberAddResponse))},
		{service: "etcdserverpb.Cluster", name: "MemberRemove", class: classMembers, call: members(new(pb.MemberRemoveResponse))},
		{service: "etcdserverpb.Cluster", name: "MemberUpdate", class: classMembers, call: members(new(pb.MemberUpdateResponse))},
		{service: "etcdserverpb.Cluster", name: "MemberList", class: classMembers, access: reads, call: members(new(pb.MemberListResponse))},
		{service: "etcdserverpb.Cluster", name: "MemberPromote", class: classMembers, call: members(new(pb.MemberPromoteResponse))},

		// A snapshot and every hash are of what etcd stores: ciphertext.
		{service: "etcdserverpb.Maintenance", name: "Alarm", class: classCheck, access: either, call: newAlarmCall},
		{service: "etcdserverpb.Maintenance", name: "Status", class: classPass, access: reads},
		{service: "etcdserverpb.Maintenance", name: "Defragment", class: classPass},
		{service: "etcdserverpb.Maintenance", name: "Hash", class: classPass, access: reads},
		{service: "etcdserverpb.Maintenance", name: "HashKV", class: classPass, access: reads},
		{service: "etcdserverpb.Maintenance", name: "Snapshot", class: classPass, access: reads, Shape: ShapeServerStream},
		{service: "etcdserverpb.Maintenance", name: "MoveLeader", class: classPass},
		{service: "etcdserverpb.Maintenance", name: "Downgrade", class: classPass},

		{service: "etcdserverpb.Auth", name: "AuthEnable", class: classPass},
		{service: "etcdserverpb.Auth", name: "AuthDisable", class: classPass},
		{service: "etcdserverpb.Auth", name: "AuthStatus", class: classPass, access: reads},
		{service: "etcdserverpb.Auth", name: "Authenticate", class: classPass, access: reads},
		{service: "etcdserverpb.Auth", name: "UserAdd", class: classPass},
		{service: "etcdserverpb.Auth", name: "UserGet", class: classPass, access: reads},
		{service: "etcdserverpb.Auth", name: "UserList", class: classPass, access: reads},
		{service: "etcdserverpb.Auth", name: "UserDelete", class: classPass},
		{service: "etcdserverpb.Auth", name: "UserChangePassword", class: classPass},
		{service: "etcdserverpb.Auth", name: "UserGrantRole", class: classPass},
		{service: "etcdserverpb.Auth", name: "UserRevokeRole", class: classPass},
		{service: "etcdserverpb.Auth", name: "RoleAdd", class: classPass},
		{service: "etcdserverpb.Auth", name: "RoleGet", class: classPass, access: reads},
		{service: "etcdserverpb.Auth", name: "RoleList", class: classPass, access: reads},
		{service: "etcdserverpb.Auth", name: "RoleDelete", class: classPass},
		{service: "etcdserverpb.Auth", name: "RoleGrantPermission", class: classPass},
		{service: "etcdserverpb.Auth", name: "RoleRevokePermission", class: classPass},

		// The server itself reads, compares and writes the values of these, so where a rule covers
		// them the server is here.
		{service: "v3electionpb.Election", name: "Campaign", class: classHost, Indefinite: true, call: newElectionCall(namedKeys, writes)},
		{service: "v3electionpb.Election", name: "Proclaim", class: classHost, call: newElectionCall(leaderKey, writes)},
		{service: "v3electionpb.Election", name: "Leader", class: classHost, access: reads, call: newElectionCall(namedKeys, reads)},
		{service: "v3electionpb.Election", name: "Observe", class: classHost, access: reads, Shape: ShapeServerStream, Indefinite: true, call: newElectionCall(namedKeys, reads)},
		{service: "v3electionpb.Election", name: "Resign", class: classHost, call: newElectionCall(leaderKey, writes)},
		{service: "v3lockpb.Lock", name: "Lock", class: classHost, Indefinite: true, call: newElectionCall(namedKeys, writes)},
		{service: "v3lockpb.Lock", name: "Unlock", class: classHost, call: newElectionCall(lockKey, writes)},

		{service: "grpc.health.v1.Health", name: "Check", class: classPass, access: reads},
		{service: "grpc.health.v1.Health", name: "List", class: classPass, access: reads},
		{service: "grpc.health.v1.Health", name: "Watch", class: classPass, access: reads, Shape: ShapeServerStream, Indefinite: true},
	}
	for _, m := range table {
		m.Path = "/" + m.service + "/" + m.name
	}
	return table
}

// streamDesc describes the method to grpc-go.
func (m *Method) streamDesc() *grpc.StreamDesc {
	return &grpc.StreamDesc{
		StreamName:    m.name,
		ServerStreams: m.Shape != ShapeUnary,
		ClientStreams: m.Shape == ShapeBidiStream,
	}
}

// relays reports whether the frames of a method's calls are relayed: it carries no value, or values
// that are rewritten in place.
func (m *Method) relays() bool {
	return m.class == classPass && m.service != "grpc.health.v1.Health" || m.class == classCheck || m.class == classRewrite
}
