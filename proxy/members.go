package proxy

import (
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// memberCall is a call whose answer names members. A client that goes to their own URLs, as AutoSync has it do, would go round the proxy: so it is told of URLs that lead here.
type memberCall struct {
	whole
	core *core
	id   *Identity
	into func() membersOf
}

// membersOf is an answer that names members.
type membersOf interface {
	proto.Message
	GetMembers() []*pb.Member
}

// members makes the call for one kind of answer.
func members[M membersOf]() func(*core, *Identity) call {
	return func(c *core, id *Identity) call {
		return &memberCall{core: c, id: id, into: func() membersOf {
			var none M
			m, _ := none.ProtoReflect().New().Interface().(membersOf)
			return m
		}}
	}
}

func (*memberCall) request(_ mode, msg []byte) ([]byte, error) { return msg, nil }

func (c *memberCall) scans() bool { return len(c.id.advertise) > 0 }

func (c *memberCall) response(_ mode, msg []byte) ([]byte, error) {
	answer := c.into()
	if err := decode(msg, answer); err != nil {
		return nil, c.core.status(err, true)
	}
	all := answer.GetMembers()
	if added, ok := answer.(*pb.MemberAddResponse); ok && added.GetMember() != nil {
		all = append(slices.Clone(all), added.GetMember())
	}
	for _, m := range all {
		if len(m.GetClientURLs()) > 0 { // a member that has not started yet has none
			m.ClientURLs = c.core.urlsOf(m, c.id)
		}
	}
	out, err := encode(answer)
	return out, c.core.status(err, true)
}

// urlsOf are the URLs of the listener that leads to a member, and else those of the listener that is asked.
func (c *core) urlsOf(m *pb.Member, id *Identity) []string {
	for _, l := range c.pinned {
		if len(l.AdvertiseClientURLs) > 0 && slices.Contains(m.GetClientURLs(), l.Endpoint) {
			return l.AdvertiseClientURLs
		}
	}
	return id.advertise
}
