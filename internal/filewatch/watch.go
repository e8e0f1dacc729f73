package filewatch

import (
	"context"
	"crypto/sha256"
	"os"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/periodic"
)

// interval is the time between two reads of a file that is watched.
const interval = settle

// Digest identifies a file's content. A file that cannot be read has the zero digest.
func Digest(path string) [sha256.Size]byte {
	data, err := os.ReadFile(path) //nolint:gosec // the operator names the file
	if err != nil {
		return [sha256.Size]byte{}
	}
	defer clear(data) // it may hold keys
	return sha256.Sum256(data)
}

// Watch calls changed each time that the digest of the file at path differs from seen, or from that
// of the last call, until ctx ends. A change counts once two reads have found the same content,
// because editors write in steps. It polls: that also works behind symbolic links, on network file
// systems and on hosts that have no inotify watch left.
func Watch(ctx context.Context, path string, seen [sha256.Size]byte, changed func()) {
	last := seen
	periodic.Run(ctx, interval, func() {
		now := Digest(path)
		if now != seen && now == last {
			seen = now
			changed()
		}
		last = now
	})
}
