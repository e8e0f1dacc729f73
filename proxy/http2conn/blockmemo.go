package http2conn

import (
	"bytes"
	"slices"

	"golang.org/x/net/http2/hpack"
)

// tableSize is the largest dynamic table of header fields, in bytes, on either side.
const tableSize = 4096

// Limits of what a connection remembers of header blocks, for each direction. A gRPC client repeats
// few blocks, of about 10 bytes each, once its fields are in the dynamic table.
const (
	maxMemoBlock   = 32 // bytes, each of which is a field
	maxMemoEntries = 8
)

// blockMemo remembers header blocks that consist of indexed fields only. What such a block means is
// a function of its bytes and of the dynamic table. It does not change the table, so the memo is
// valid until another kind of block is coded. The strings that it refers to are in the tables, too.
type blockMemo[T any] struct {
	entries []memoEntry[T]
	next    int // which entry is replaced when there are maxMemoEntries
}

type memoEntry[T any] struct {
	block []byte
	value T
}

// indexedOnly reports whether a block consists of indexed fields only (RFC 7541, section 6.1), of
// one byte each.
func indexedOnly(block []byte) bool {
	const indexed, longIndex = 0x80, 0xff
	if len(block) > maxMemoBlock {
		return false
	}
	for _, b := range block {
		if b < indexed || b == longIndex {
			return false
		}
	}
	return true
}

// find returns what was added for a block, or nil.
func (m *blockMemo[T]) find(block []byte) *T {
	for i := range m.entries {
		if e := &m.entries[i]; bytes.Equal(e.block, block) {
			return &e.value
		}
	}
	return nil
}

// add remembers a value for a block, which it copies.
func (m *blockMemo[T]) add(block []byte, value T) {
	e := memoEntry[T]{bytes.Clone(block), value}
	if len(m.entries) < maxMemoEntries {
		m.entries = append(m.entries, e)
		return
	}
	m.entries[m.next] = e
	m.next = (m.next + 1) % maxMemoEntries
}

// clear forgets everything: the dynamic table changes.
func (m *blockMemo[T]) clear() {
	clear(m.entries)
	m.entries, m.next = m.entries[:0], 0
}

// headerEncoder encodes header lists. The caller serializes its methods.
type headerEncoder struct {
	hpack *hpack.Encoder // to block
	block bytes.Buffer
	memo  blockMemo[[]hpack.HeaderField]
}

// sameFields reports whether two lists are equal. Most are the same slice.
func sameFields(a, b []hpack.HeaderField) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0] || slices.Equal(a, b))
}

// encode returns the block of a header list and, unless it has no name, of last. The block is valid
// until the next call. last is not indexed: its value differs for each stream, and what is
// remembered stays valid. encode keeps the list, which must not change.
func (e *headerEncoder) encode(fields []hpack.HeaderField, last hpack.HeaderField) []byte {
	block := e.encodeList(fields)
	if last.Name == "" {
		return block
	}
	e.block.Reset()
	e.block.Write(block) // which may be what was there
	last.Sensitive = true
	_ = e.hpack.WriteField(last)
	return e.block.Bytes()
}

func (e *headerEncoder) encodeList(fields []hpack.HeaderField) []byte {
	if len(fields) <= maxMemoBlock {
		for i := range e.memo.entries {
			if known := &e.memo.entries[i]; sameFields(known.value, fields) {
				return known.block
			}
		}
	}
	if e.block.Reset(); e.block.Cap() > maxFrameSize { // long blocks are rare
		e.block = *bytes.NewBuffer(nil)
	}
	for _, f := range fields {
		_ = e.hpack.WriteField(f) // a bytes.Buffer returns no error
	}
	block := e.block.Bytes()
	if indexedOnly(block) {
		e.memo.add(block, fields)
	} else {
		e.memo.clear()
	}
	return block
}

// setTableSize changes the size of the dynamic table. The next block announces it.
func (e *headerEncoder) setTableSize(n uint32) {
	e.memo.clear()
	e.hpack.SetMaxDynamicTableSize(n)
}
