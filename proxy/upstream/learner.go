package upstream

import (
	"context"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/status"
)

// A learner of etcd's serves Status, serializable reads and snapshots, and refuses every other
// call. etcd's client library then tries another of its endpoints. A client of the proxy has one
// endpoint alone, so the proxy keeps calls off learners while another member is connected.
//
// A member is requested its health, which a learner refuses like any other call and before it looks
// for a user. Status tells more, but needs a token from etcd 3.7 on where authentication is on.

// Times of the question whether a member is a learner.
const (
	RoleTimeout = time.Second // after which a member counts as one that votes
	// RoleInterval: between two questions to a learner, which may have been promoted
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

// LearnerRefusal returns what etcd says to a call that learners refuse, if it is a learner, and
// otherwise nil. The call is the question for its health.
func (u *Cluster) LearnerRefusal(ctx context.Context) error {
	if err := u.checkHealth(OutgoingContext(ctx)); refusedByLearner(err) {
		return err
	}
	return nil
}
