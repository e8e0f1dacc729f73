package etcdapi

import (
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// memberCall is a call whose response names members. A client that goes to their own URLs, as
// AutoSync has it do, would not use the proxy: so it is told of URLs that lead here.
type memberCall struct {
	whole
	core *Core
	id   *listener.Identity
	kind membersOf // an empty response of the call, which is not changed
}

// membersOf is a response that names members.
type membersOf interface {
	proto.Message
	GetMembers() []*pb.Member
}

// members makes the call for one kind of response.
func members(response membersOf) newCall {
	return func(c *Core, id *listener.Identity, _ *CallMemory) Call {
		return &memberCall{core: c, id: id, kind: response}
	}
}

func (*memberCall) Request(_ Mode, msg []byte) ([]byte, error) { return msg, nil }

func (c *memberCall) Scans() bool { return len(c.id.AdvertiseClientURLs) > 0 }

func (c *memberCall) Response(_ Mode, dst, msg []byte) ([]byte, error) {
	response := proto.CloneOf(c.kind)
	if err := rpc.Unmarshal(msg, response); err != nil {
		return nil, c.core.status(err, true)
	}
	all := response.GetMembers()
	if added, ok := response.(*pb.MemberAddResponse); ok && added.GetMember() != nil {
		all = append(slices.Clone(all), added.GetMember())
	}
	for _, m := range all {
		if len(m.GetClientURLs()) > 0 { // a member that has not started yet has none
			m.ClientURLs = c.core.urlsOf(m, c.id)
		}
	}
	out, err := rpc.Marshal(response)
	return append(dst, out...), c.core.status(err, true)
}

// urlsOf are the URLs of the listener that leads to a member, and else those of the listener that
// is asked.
func (c *Core) urlsOf(m *pb.Member, id *listener.Identity) []string {
	for _, l := range c.Pinned {
		if len(l.AdvertiseClientURLs) > 0 && slices.Contains(m.GetClientURLs(), l.Endpoint) {
			return l.AdvertiseClientURLs
		}
	}
	return id.AdvertiseClientURLs
}
