package etcdapi

import (
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
)

// alarmCall is an Alarm: to list alarms changes nothing, to raise one or to disarm it does.
type alarmCall struct {
	unread
	id *listener.Identity
}

func newAlarmCall(_ *Core, id *listener.Identity, _ *CallMemory) Call { return &alarmCall{id: id} }

func (c *alarmCall) Request(_ Mode, msg []byte) ([]byte, error) {
	if !c.id.ReadOnly() {
		return msg, nil
	}
	// an error if it says its action twice: decoders may disagree about that
	action, err := etcdwire.AlarmAction(msg)
	if err != nil || pb.AlarmRequest_AlarmAction(action) != pb.AlarmRequest_GET {
		return nil, errReadOnly
	}
	return msg, nil
}
