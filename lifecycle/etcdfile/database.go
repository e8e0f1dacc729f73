package etcdfile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// isDatabase reports whether a file is a bbolt database, which has a magic number in its first
// page, after the header of 16 bytes.
func isDatabase(r io.ReaderAt) bool {
	const magic = 0xED0CDAED
	var b [20]byte
	_, err := r.ReadAt(b[:], 0)
	return err == nil && binary.LittleEndian.Uint32(b[16:]) == magic
}

const lockWait = time.Second

// keyBucket is where etcd keeps revisions.
const keyBucket = "key"

// database decodes every revision in a database.
func (l *inspection) database(ctx context.Context, path string) error {
	l.checksum(path)
	// bbolt panics on a damaged database, and reads beyond the end of a truncated one, which is a
	// memory fault.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			l.damage("it is damaged: the parts that could not be decoded were only searched")
		}
	}()
	db, err := bbolt.Open(path, 0o400, &bbolt.Options{ReadOnly: true, Timeout: lockWait})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return errLocked
	}
	if err != nil {
		l.damage("it cannot be opened as a database (%v): its bytes were only searched", err)
		return nil
	}
	defer func() { _ = db.Close() }() // it was only read
	return db.View(func(tx *bbolt.Tx) error {
		if err := checkSize(path, tx); err != nil {
			l.damage("it is damaged: %v", err)
		}
		if err := checkPages(path, tx); err != nil {
			l.damage("it is damaged (%v): its bytes were only searched", err)
			return nil
		}
		return l.revisions(ctx, tx)
	})
}

// checkSize returns an error if the file at path is smaller than its database. The remaining pages
// may be readable, and hold outdated values.
func checkSize(path string, tx *bbolt.Tx) error {
	info, err := os.Stat(path)
	if err == nil && info.Size() < tx.Size() {
		return fmt.Errorf("it is truncated to %d of %d bytes", info.Size(), tx.Size())
	}
	return err
}

// revisions visits etcd's bucket "key": from revisions, oldest first, to mvccpb.KeyValue.
func (l *inspection) revisions(ctx context.Context, tx *bbolt.Tx) error {
	bucket := tx.Bucket([]byte(keyBucket))
	if bucket == nil {
		l.damage("it is not an etcd database: it has no bucket \"key\"")
		return nil
	}
	live := make(map[[sha256.Size]byte]int64) // the last revision of each key with a finding
	type old struct {
		Finding
		id [sha256.Size]byte
	}
	var pending []old
	err := bucket.ForEach(func(revision, encoded []byte) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		kv, ok := decodeKeyValue(encoded)
		if !ok || len(revision) < 17 {
			l.damage("revision %x is not decoded", revision)
			return nil
		}
		l.file.Values++
		main := int64(binary.BigEndian.Uint64(revision)) //nolint:gosec // etcd's own
		id := sha256.Sum256(kv.Key)
		if _, found := live[id]; found {
			live[id] = main
		}
		// a tombstone: the revision is followed by "t", and there is only a key
		if len(revision) == 18 {
			return nil
		}
		why := l.Judge(kv.Key, kv.Value, true)
		if why == "" {
			return nil
		}
		live[id] = main
		if len(l.reported) < maxReported {
			l.reported[identityOf(kv.Key, kv.ModRevision)] = true
		}
		if len(pending) < maxReported {
			pending = append(pending, old{Finding{Place: History, Key: string(kv.Key), Revision: main, Offset: -1, Why: why}, id})
		}
		return nil
	})
	for _, p := range pending {
		if live[p.id] == p.Revision {
			p.Place = Live
		}
		l.found(p.Finding)
	}
	if len(pending) == maxReported {
		l.file.Notes = append(l.file.Notes, fmt.Sprintf("only the first %d values are reported", maxReported))
	}
	return err
}

// checksum verifies the SHA-256 at the end of etcd's snapshots.
func (l *inspection) checksum(path string) {
	f, err := os.Open(path) //nolint:gosec // the operator names the file
	if err != nil {
		return
	}
	defer func() { _ = f.Close() }() // it was only read
	const page = 512                 // every size of a page is a multiple
	if l.file.Bytes%page != sha256.Size {
		return
	}
	h, tail := sha256.New(), make([]byte, sha256.Size)
	_, err = io.Copy(h, io.LimitReader(f, l.file.Bytes-sha256.Size))
	if err == nil {
		_, err = io.ReadFull(f, tail)
	}
	if err != nil || !bytes.Equal(h.Sum(nil), tail) {
		l.damage("its checksum is wrong: it was changed or cut since it was saved")
	}
}

// decodeKeyValue decodes what etcd stores for a revision.
func decodeKeyValue(b []byte) (kv *mvccpb.KeyValue, ok bool) {
	kv = new(mvccpb.KeyValue)
	err := proto.Unmarshal(b, kv)
	return kv, err == nil && len(kv.Key) > 0
}

// fields calls visit for each varint and bytes field of a message; data is nil for a varint. It
// returns false if b is not a message.
func fields(b []byte, visit func(n protowire.Number, v uint64, data []byte)) bool {
	for len(b) > 0 {
		n, t, size := protowire.ConsumeTag(b)
		if size < 0 {
			return false
		}
		b = b[size:]
		switch t {
		case protowire.VarintType:
			v, size := protowire.ConsumeVarint(b)
			if size < 0 {
				return false
			}
			visit(n, v, nil)
			b = b[size:]
		case protowire.BytesType:
			data, size := protowire.ConsumeBytes(b)
			if size < 0 {
				return false
			}
			if data == nil {
				data = []byte{}
			}
			visit(n, 0, data)
			b = b[size:]
		default:
			size := protowire.ConsumeFieldValue(n, t, b)
			if size < 0 {
				return false
			}
			b = b[size:]
		}
	}
	return true
}

// Value is the current value of an etcd key in a database.
type Value struct {
	Key, Value []byte
	Revision   int64 // that wrote it
}

// LiveValues returns the current values of the keys that match, in key order, from a snapshot or
// the database of a stopped member. It returns an error if the file is not such a database, or is
// damaged.
func LiveValues(ctx context.Context, path string, match func(key []byte) bool) (values []Value, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // see database
	defer func() {
		if p := recover(); p != nil { // bbolt panics on a damaged database
			values, err = nil, errors.New("the database is damaged")
		}
	}()
	db, err := bbolt.Open(path, 0o400, &bbolt.Options{ReadOnly: true, Timeout: lockWait})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, errLocked
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = db.Close() }() // it was only read
	last := make(map[string]Value)
	err = db.View(func(tx *bbolt.Tx) error {
		if err := checkSize(path, tx); err != nil {
			return fmt.Errorf("the database is damaged: %w", err)
		}
		if err := checkPages(path, tx); err != nil {
			return fmt.Errorf("the database is damaged: %w", err)
		}
		bucket := tx.Bucket([]byte(keyBucket))
		if bucket == nil {
			return errors.New("it is not an etcd database")
		}
		return bucket.ForEach(func(revision, encoded []byte) error {
			kv, ok := decodeKeyValue(encoded)
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case !ok || len(revision) < 17 || !match(kv.Key):
			case len(revision) == 18:
				delete(last, string(kv.Key))
			default:
				last[string(kv.Key)] = Value{kv.Key, kv.Value, kv.ModRevision}
			}
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	for _, key := range slices.Sorted(maps.Keys(last)) {
		values = append(values, last[key])
	}
	return values, nil
}
