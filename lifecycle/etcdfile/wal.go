package etcdfile

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"

	"google.golang.org/protobuf/encoding/protowire"
)

// span is a part of a file, in bytes.
type span struct{ from, to int64 }

// spans are parts of a file, in order.
type spans []span

// contain reports whether an offset is in one of the spans.
func (s spans) contain(offset int64) bool {
	for _, x := range s { // few, because add merges adjacent spans
		if offset >= x.from && offset < x.to {
			return true
		}
	}
	return false
}

func (s *spans) add(x span) {
	if n := len(*s); n > 0 && (*s)[n-1].to == x.from {
		(*s)[n-1].to = x.to
		return
	}
	*s = append(*s, x)
}

// Types of records in etcd's write-ahead log (walpb) that are decoded here, and limits.
const (
	recordEntry = 2
	recordCRC   = 4
	maxRecord   = 512 << 20
	maxTxnDepth = 128
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// log decodes a write-ahead log. Each frame is a length of 8 bytes, whose upper byte holds the size
// of the padding, and a walpb.Record with a CRC over all data so far. log returns the decoded
// spans. After the last valid record there are zeros, because etcd preallocates the file, or a
// record torn by a crash.
func (l *inspection) log(ctx context.Context, r io.Reader) spans {
	var decoded spans
	in, at := bufio.NewReaderSize(r, 1<<20), int64(0)
	defer func() {
		if at == 0 && !l.file.Damaged {
			l.damage("it holds no record")
		}
	}()
	sum, chained := uint32(0), false
	for ctx.Err() == nil {
		var head [8]byte
		if _, err := io.ReadFull(in, head[:]); err != nil {
			if !errors.Is(err, io.EOF) {
				l.damage("it ends within a record at byte %d", at)
			}
			return decoded
		}
		field := binary.LittleEndian.Uint64(head[:])
		if field == 0 {
			return decoded // preallocated
		}
		length, pad := int64(field&(1<<56-1)), int64(0)
		if field>>63 == 1 {
			pad = int64(field >> 56 & 7)
		}
		if length > maxRecord || at+8+length+pad > l.file.Bytes {
			l.damage("the record at byte %d is torn: from there on the bytes were only searched", at)
			return decoded
		}
		frame := make([]byte, length+pad)
		if _, err := io.ReadFull(in, frame); err != nil {
			l.damage("it cannot be read at byte %d: %v", at, err)
			return decoded
		}
		var kind, crc uint64
		var data []byte
		ok := fields(frame[:length], func(n protowire.Number, v uint64, d []byte) {
			switch n {
			case 1:
				kind = v
			case 2:
				crc = v
			case 3:
				data = d
			}
		})
		if !ok {
			l.damage("the record at byte %d is damaged: from there on the bytes were only searched", at)
			return decoded
		}
		if kind == recordCRC { // each file begins with the checksum over the files before it
			sum, chained = uint32(crc), true
		} else if sum = crc32.Update(sum, castagnoli, data); chained && sum != uint32(crc) {
			l.damage("the checksum of the record at byte %d is wrong: from there on the bytes were only searched", at)
			return decoded
		}
		if kind == recordEntry {
			l.entry(data, at)
		}
		decoded.add(span{at, at + 8 + length + pad})
		at += 8 + length + pad
	}
	return decoded
}

// entry decodes a raftpb.Entry. The data of an entry of the normal type is an InternalRaftRequest
// of etcd.
func (l *inspection) entry(entry []byte, at int64) {
	normal, data := true, []byte(nil)
	fields(entry, func(n protowire.Number, v uint64, d []byte) {
		switch n {
		case 1:
			normal = v == 0
		case 4:
			data = d
		}
	})
	if !normal {
		return
	}
	fields(data, func(n protowire.Number, _ uint64, d []byte) {
		switch n {
		case 4: // put
			l.put(d, at)
		case 6: // txn
			l.txn(d, at, 0)
		}
	})
}

// txn judges the values in both branches of a TxnRequest and in its compares.
func (l *inspection) txn(b []byte, at int64, depth int) {
	if depth > maxTxnDepth {
		return
	}
	fields(b, func(n protowire.Number, _ uint64, d []byte) {
		switch n {
		case 1: // compare: key 3, value 7
			var key, value []byte
			fields(d, func(n protowire.Number, _ uint64, d []byte) {
				switch n {
				case 3:
					key = d
				case 7:
					value = d
				}
			})
			if len(value) > 0 {
				l.judge(key, value, at)
			}
		case 2, 3: // success, failure: RequestOp
			fields(d, func(n protowire.Number, _ uint64, d []byte) {
				switch n {
				case 2:
					l.put(d, at)
				case 4:
					l.txn(d, at, depth+1)
				}
			})
		}
	})
}

// put judges the value of a PutRequest.
func (l *inspection) put(b []byte, at int64) {
	var key, value []byte
	ignored := false
	fields(b, func(n protowire.Number, v uint64, d []byte) {
		switch n {
		case 1:
			key = d
		case 2:
			value = d
		case 5:
			ignored = v != 0 // the request leaves the value unchanged
		}
	})
	if !ignored {
		l.judge(key, value, at)
	}
}

func (l *inspection) judge(key, value []byte, at int64) {
	l.file.Values++
	if why := l.Judge(key, value, true); why != "" {
		l.found(Finding{Place: Log, Key: string(key), Offset: at, Why: why})
	}
}
