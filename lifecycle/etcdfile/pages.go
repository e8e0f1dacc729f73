package etcdfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"go.etcd.io/bbolt"
)

// bbolt follows the pages of a tree wherever they lead, in a circle too, until there is no memory
// left; no recover helps then. So pages are checked before it does.
//
//	page      id 8 | flags 2 | count 2 | overflow 4 | elements … , further pages behind this one if overflow > 0
//	branch    pos 4 | key size 4 | page id 8                               pos counts from the element's own beginning
//	leaf      flags 4 | pos 4 | key size 4 | value size 4
//	bucket    page id of its root 8 | sequence 8 | its only page, where that id is 0, as a value of a leaf with flag 1
const (
	pageHeader  = 16
	elementSize = 16
	bucketSize  = 16
	branchPage  = 1
	leafPage    = 2
	bucketLeaf  = 1
	maxDepth    = 32 // each page of a tree has two below it or more
)

// pages are those of one database.
type pages struct {
	file io.ReaderAt
	size int64
	seen []bool // by page id
}

// sound returns nil if the pages that lead to etcd's bucket "key", and those in it, are a tree
// within the file.
func sound(path string, tx *bbolt.Tx) error {
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

// tree checks a page and all below it. root is the tree of the buckets.
func (p *pages) tree(id uint64, depth int, root bool) error {
	if depth > maxDepth {
		return fmt.Errorf("page %d is too deep", id)
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
		return fmt.Errorf("page %d ends behind the file", id)
	}
	for n := id; n <= id+overflow; n++ {
		if p.seen[n] {
			return fmt.Errorf("page %d is used twice", n)
		}
		p.seen[n] = true
	}
	if self := binary.LittleEndian.Uint64(page); self != id {
		return fmt.Errorf("page %d calls itself %d", id, self)
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

// page checks the elements of a page of limit bytes that begins at a place of the file with the
// bytes head. It returns the pages below it.
func (p *pages) page(head []byte, at, limit int64, root bool) (below []uint64, err error) {
	kind, count := binary.LittleEndian.Uint16(head[8:]), int64(binary.LittleEndian.Uint16(head[10:]))
	if kind != branchPage && kind != leafPage || kind == branchPage && count == 0 {
		return nil, errors.New("it is none of a tree")
	}
	end := pageHeader + count*elementSize
	if end > limit {
		return nil, errors.New("its elements end behind it")
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
				return nil, errors.New("a key ends behind it")
			}
			below = append(below, binary.LittleEndian.Uint64(e[8:]))
			continue
		}
		if from+word(1)+word(2)+word(3) > limit {
			return nil, errors.New("a value ends behind it")
		}
		if root && word(0)&bucketLeaf != 0 {
			if err := p.bucket(at+from+word(1), word(2), word(3)); err != nil {
				return nil, err
			}
		}
	}
	return below, nil
}

// bucket checks the pages of the bucket whose name and value begin at a place of the file, if it is
// etcd's "key". What is in others is not read.
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
		err = errors.New("it has a branch in a bucket of its own")
	}
	return err
}
