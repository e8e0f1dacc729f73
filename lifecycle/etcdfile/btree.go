package etcdfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"go.etcd.io/bbolt"
)

// bbolt follows the page references of a B+tree without checks. A cycle exhausts the memory, which
// no recover prevents. Therefore the pages are checked first.
//
//	page      id 8 | flags 2 | count 2 | overflow 4 | elements … , followed by more pages if overflow > 0
//	branch    pos 4 | key size 4 | page id 8                               pos is relative to the element
//	leaf      flags 4 | pos 4 | key size 4 | value size 4
//	bucket    page id of its root 8 | sequence 8 | its only page if that id is 0; the value of a leaf with flag 1
const (
	pageHeader  = 16
	elementSize = 16
	bucketSize  = 16
	branchPage  = 1
	leafPage    = 2
	bucketLeaf  = 1
	maxDepth    = 32 // each branch page has at least two children
)

// pages checks the pages of one database.
type pages struct {
	file io.ReaderAt
	size int64
	seen []bool // by page id
}

// checkPages returns nil if the pages on the path to etcd's bucket "key", and those of the bucket,
// form a tree within the file.
func checkPages(path string, tx *bbolt.Tx) error {
	f, err := os.Open(path) //nolint:gosec // the operator names the file
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // it was only read
	info, err := f.Stat()
	if err != nil {
		return err
	}
	size := int64(tx.DB().Info().PageSize)
	p := &pages{file: f, size: size, seen: make([]bool, min(info.Size(), tx.Size())/size)}
	return p.tree(uint64(tx.Cursor().Bucket().Root()), 0, true)
}

// tree checks a page and its descendants. root is set for the tree of the buckets.
func (p *pages) tree(id uint64, depth int, root bool) error {
	if depth > maxDepth {
		return fmt.Errorf("page %d is nested too deep", id)
	}
	if id >= uint64(len(p.seen)) {
		return fmt.Errorf("there is no page %d", id)
	}
	at := int64(id) * p.size //nolint:gosec // less than the number of pages
	page := make([]byte, p.size)
	if _, err := p.file.ReadAt(page, at); err != nil {
		return fmt.Errorf("read page %d: %w", id, err)
	}
	overflow := uint64(binary.LittleEndian.Uint32(page[12:]))
	if overflow >= uint64(len(p.seen))-id {
		return fmt.Errorf("page %d extends beyond the file", id)
	}
	for n := id; n <= id+overflow; n++ {
		if p.seen[n] {
			return fmt.Errorf("page %d is used twice", n)
		}
		p.seen[n] = true
	}
	if self := binary.LittleEndian.Uint64(page); self != id {
		return fmt.Errorf("page %d has the ID %d", id, self)
	}
	branch, err := p.page(page, at, (1+int64(overflow))*p.size, root) //nolint:gosec // less than the file
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	for _, below := range branch {
		if err := p.tree(below, depth+1, root); err != nil {
			return err
		}
	}
	return nil
}

// page checks the elements of a page of limit bytes, which begins at an offset of the file with the
// bytes head. It returns the IDs of its child pages.
func (p *pages) page(head []byte, at, limit int64, root bool) (below []uint64, err error) {
	kind, count := binary.LittleEndian.Uint16(head[8:]), int64(binary.LittleEndian.Uint16(head[10:]))
	if kind != branchPage && kind != leafPage || kind == branchPage && count == 0 {
		return nil, errors.New("it is not part of the B+tree")
	}
	end := pageHeader + count*elementSize
	if end > limit {
		return nil, errors.New("its elements extend beyond it")
	}
	if end > int64(len(head)) {
		head = make([]byte, end)
		if _, err := p.file.ReadAt(head, at); err != nil {
			return nil, err
		}
	}
	for n := range count {
		from := pageHeader + n*elementSize
		e := head[from : from+elementSize]
		word := func(n int) int64 { return int64(binary.LittleEndian.Uint32(e[4*n:])) }
		if kind == branchPage {
			if from+word(0)+word(1) > limit {
				return nil, errors.New("a key extends beyond it")
			}
			below = append(below, binary.LittleEndian.Uint64(e[8:]))
			continue
		}
		if from+word(1)+word(2)+word(3) > limit {
			return nil, errors.New("a value extends beyond it")
		}
		if root && word(0)&bucketLeaf != 0 {
			if err := p.bucket(at+from+word(1), word(2), word(3)); err != nil {
				return nil, err
			}
		}
	}
	return below, nil
}

// bucket checks the pages of the bucket whose name and value are at an offset of the file, if it is
// etcd's "key". Other buckets are not read.
func (p *pages) bucket(at, name, value int64) error {
	if name != int64(len(keyBucket)) {
		return nil
	}
	if value > p.size {
		return errors.New("it has a bucket that is too long")
	}
	b := make([]byte, name+value)
	if _, err := p.file.ReadAt(b, at); err != nil {
		return err
	}
	if string(b[:name]) != keyBucket {
		return nil
	}
	b = b[name:]
	if value < bucketSize {
		return errors.New("it has a bucket that is too short")
	}
	if root := binary.LittleEndian.Uint64(b); root != 0 {
		return p.tree(root, 0, false)
	}
	if b = b[bucketSize:]; len(b) < pageHeader {
		return errors.New("it has a bucket that is too short")
	}
	below, err := p.page(b, at+name+bucketSize, int64(len(b)), false)
	if err == nil && len(below) > 0 {
		err = errors.New("it has a branch in an inline bucket")
	}
	return err
}
