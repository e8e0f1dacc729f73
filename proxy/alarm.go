package proxy

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/encoding/protowire"
)

// alarmCall is an Alarm: to list alarms changes nothing, to raise one or to disarm it does.
type alarmCall struct {
	whole
	id *Identity
}

func newAlarmCall(_ *core, id *Identity) call { return &alarmCall{id: id} }

func (c *alarmCall) request(_ context.Context, msg []byte) ([]byte, error) {
	if !c.id.readOnly() {
		return msg, nil
	}
	// Decoders may disagree about a request that says its action twice, so any action but the first
	// refuses it.
	const action = 1
	for rest := msg; len(rest) > 0; {
		num, typ, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return nil, errReadOnly
		}
		rest = rest[n:]
		if num == action && typ == protowire.VarintType {
			if v, n := protowire.ConsumeVarint(rest); n < 0 || pb.AlarmRequest_AlarmAction(int32(v)) != pb.AlarmRequest_GET { //nolint:gosec // as decoders cut it
				return nil, errReadOnly
			}
		}
		if n = protowire.ConsumeFieldValue(num, typ, rest); n < 0 {
			return nil, errReadOnly
		}
		rest = rest[n:]
	}
	return msg, nil
}

func (*alarmCall) scans() bool { return false }

func (*alarmCall) response(_ context.Context, msg []byte) ([]byte, error) { return msg, nil }
