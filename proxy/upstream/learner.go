package upstream

import (
	"context"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/status"
)

// A learner of etcd serves Status, serializable reads and snapshots, and refuses every other call.
// etcd's client library then tries another of its endpoints. A client of the proxy has only one
// endpoint, so the proxy sends calls to learners only while no other member is connected.
//
// To detect a learner, the proxy calls the health service of a member. A learner refuses that call
// like most others, and before it checks the user. Status would show more, but since etcd 3.7 it
// needs a token if authentication is on.

// Times of the check whether a member is a learner.
const (
	RoleTimeout = time.Second // after which a member counts as one that votes
	// RoleInterval: between two checks of a learner, which may have been promoted
	RoleInterval = 2 * time.Second
)

// LearnerRefusalText is the message of a learner that does not serve a call. The code is not the
// same in all versions.
var LearnerRefusalText = status.Convert(rpctypes.ErrGRPCNotSupportedForLearner).Message()

// refusedByLearner reports whether err is a learner's refusal. A learner refuses a call before it
// inspects it, so nothing of the call was done, and the call may be made once more on another
// member.
func refusedByLearner(err error) bool {
	return err != nil && status.Convert(err).Message() == LearnerRefusalText
}

// LearnerRefusal returns the error of a learner for a call that learners refuse, and nil if the
// member is not a learner. The call is that of the health service.
func (u *Cluster) LearnerRefusal(ctx context.Context) error {
	if err := u.checkHealth(OutgoingContext(ctx)); refusedByLearner(err) {
		return err
	}
	return nil
}
