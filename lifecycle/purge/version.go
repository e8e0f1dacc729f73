package purge

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// ErrOldEtcd is in the error of [ReadHistory].
var ErrOldEtcd = errors.New("reading the history needs etcd 3.4.31, 3.5.13, 3.6 or newer")

// watchesAreWhole returns an error for versions of etcd that report progress of a watch before they
// have sent all events up to that revision, or that can lose events after a compaction. Their
// history could hold plaintext that a watch does not show. Kubernetes does not use the progress of
// these versions either.
func watchesAreWhole(ctx context.Context, c *clientv3.Client) error {
	var silent error
	responds := false
	for _, e := range c.Endpoints() {
		limited, cancel := context.WithTimeout(ctx, memberTimeout)
		s, err := c.Status(limited, e)
		cancel()
		switch {
		case err != nil:
			silent = cmp.Or(silent, err)
		case !watchIsWhole(s.Version):
			return fmt.Errorf("etcd at %s is of version %q: %w", e, s.Version, ErrOldEtcd)
		default:
			responds = true
		}
	}
	if !responds {
		return cmp.Or(ctx.Err(), silent, errors.New("there are no endpoints"))
	}
	return nil
}

// watchIsWhole reports whether a version sends complete watches. A text that is not a version
// counts as an old one.
func watchIsWhole(version string) bool {
	var major, minor, patch int
	if _, err := fmt.Sscanf(version, "%d.%d.%d", &major, &minor, &patch); err != nil {
		return false
	}
	switch {
	case major != 3:
		return major > 3
	case minor == 4:
		return patch >= 31
	case minor == 5:
		return patch >= 13
	}
	return minor > 5
}
